"""GPTQ's rounding of a block of columns on a GPU; read kernels.py first, then launch.py."""
