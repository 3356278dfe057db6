"""The Falcon-H1 family: start with config.py."""
