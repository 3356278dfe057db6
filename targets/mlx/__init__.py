"""A folder that mlx-lm runs as it is: start reading in target.py."""
