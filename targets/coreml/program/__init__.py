"""The MIL program: start with functions.py."""
