"""CoreML: start reading in target.py."""
