"""The sections of run.py, one module each; section.py says what they are."""
