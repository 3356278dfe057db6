"""What the GPU kernels of all ops share: start with kernel.py."""
