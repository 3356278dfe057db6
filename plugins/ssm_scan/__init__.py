"""The op `h1::ssm_scan`; read op.py (schema and reference) first, then kernels.py, tiles.py, launch.py, dispatch.py."""
