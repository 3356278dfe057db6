"""The target "trt": TensorRT and TensorRT-RTX on NVIDIA GPUs.

Read ``target.py`` first. ``network/`` writes the ONNX network, ``plugin/`` builds the library of the h1 ops,
``engine/`` builds engines, ``gpu/`` runs them, and ``emulator/`` executes the network on a CPU.
"""
