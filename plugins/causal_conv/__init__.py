"""The op `h1::causal_conv`; read op.py (schema and reference) first, then kernels.py, launch.py and dispatch.py."""
