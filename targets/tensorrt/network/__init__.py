"""The ONNX network that TensorRT parses: start with build.py."""
