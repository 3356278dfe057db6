"""What TensorRT needs of us, so far the plugin of the h1 ops: start with plugin/__init__.py. It is not a target yet."""
