"""Hostile input for our C++ under sanitizers: nodes of the CPU kernels, calls of the TensorRT plugin, whole artifacts."""
