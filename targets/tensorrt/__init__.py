"""The target "trt": start with target.py."""
