"""Executes the network on a CPU, part by part: start with runner.py."""
