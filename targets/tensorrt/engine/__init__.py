"""Building an engine, and what a machine must have to run it.

Read ``config.py`` first (what a builder is given), then ``build.py`` (how the builder runs in a process of its own),
``requirements.py`` (which machines may run the engine) and ``finalize.py`` (building on the machine with the GPU).
"""
