"""The ONNX network that TensorRT parses: start with lowering.py."""
