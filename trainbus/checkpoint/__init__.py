"""From a state dict in memory to a durable file and back. Knows no bus, no callback, no handler."""
