"""The front end: the model (model.py) is traced once into a Program, which passes rewrite and verify.py checks."""
