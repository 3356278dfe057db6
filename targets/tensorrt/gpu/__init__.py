"""Runs an engine on an NVIDIA GPU: start with runner.py."""
