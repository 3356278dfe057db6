"""What a loaded artifact does: Runner, sessions, generation. Imports neither torch nor onnx."""
