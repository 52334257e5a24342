"""Measurements to run by hand: ``python -m benchmarks.<name>``. Not part of the package."""
