"""Integers for weights: which tensor gets which precision (scheme.py), and where every target takes them from (source.py)."""
