"""The op `h1::ssm_scan`: start with op.py."""
