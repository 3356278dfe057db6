"""Running an engine on an NVIDIA GPU. Read ``runner.py`` first, then ``engine.py`` and ``session.py``."""
