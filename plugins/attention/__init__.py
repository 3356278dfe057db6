"""The op `h1::attention`: start with op.py."""
