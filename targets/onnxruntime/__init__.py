"""ONNX Runtime: start with target.py."""
