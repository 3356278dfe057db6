"""Hostile input for our C++ under sanitizers: nodes of the CPU kernels, calls of the plugin, whole artifacts."""
