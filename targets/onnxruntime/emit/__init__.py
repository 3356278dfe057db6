"""One emitter an op: cpu.py is the table of the CPU graph, which the other graphs change."""
