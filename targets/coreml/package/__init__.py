"""The .mlpackage on disk: writer.py writes it, and lint.py checks one for faults."""
