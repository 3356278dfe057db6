"""The op `h1::attention`; op.py has its schema and reference. It has no GPU kernel of its own."""
