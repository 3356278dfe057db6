"""Falcon-H1 for llama.cpp: one GGUF file with the integers of every other target, and llama.cpp itself to run it."""
