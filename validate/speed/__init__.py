"""Benchmarks of artifacts, and the gates that find slower or larger ones: start with bench.py."""
