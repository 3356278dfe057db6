"""What builds an engine, and what a machine must have to run it: start with config.py."""
