"""What the ONNX-based targets share: building graphs, naming, attaching weights. Never a table of ops: those are each target's own."""
