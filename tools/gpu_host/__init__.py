"""Everything that a GPU host without a package index can show of h1export, from one bundle and by one command.

`pack.py` makes the bundle on a machine without a GPU; `run.py` runs its sections on the GPU host, each in a process of
its own with a time limit.
"""
