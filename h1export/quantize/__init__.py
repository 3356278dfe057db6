"""Weights in integers: scheme.py gives every tensor a precision, and targets read the integers from source.py."""
