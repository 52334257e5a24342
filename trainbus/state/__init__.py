"""What a run must remember to go on exactly: its state, its random numbers, its place in the data."""
