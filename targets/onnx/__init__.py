"""What the ONNX-based targets share: building graphs, naming, attaching weights.

``aten.TABLE`` has the rows that all of them share; every other emitter is in the table of its target.
"""
