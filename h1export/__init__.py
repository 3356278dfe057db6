"""h1export: Falcon-H1 hybrid language models, exported to the runtimes people deploy on, and checked."""

__version__ = "0.1.0"
