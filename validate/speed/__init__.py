"""How fast an artifact is, and whether it got slower: start with bench.py."""
