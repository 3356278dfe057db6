"""Executing a TensorRT network on a CPU, subgraph by subgraph. Read ``runner.py`` first, then ``partition.py``."""
