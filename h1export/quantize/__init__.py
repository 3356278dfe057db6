"""What a method needs forward passes for: start with solve.py."""
