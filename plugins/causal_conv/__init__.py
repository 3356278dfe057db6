"""The op `h1::causal_conv`: start with op.py."""
