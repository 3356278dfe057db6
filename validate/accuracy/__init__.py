"""Comparison of an artifact with the PyTorch reference: start with run.py."""
