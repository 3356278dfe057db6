"""ONNX Runtime: start with ops.py (the table of ops), then target.py."""
