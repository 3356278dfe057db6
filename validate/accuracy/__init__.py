"""Whether an artifact is right, and where it is not: start with run.py."""
