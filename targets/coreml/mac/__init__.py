"""The files of an artifact for users with a Mac, where the package can be run and checked.

readme.py writes them: README.md, mac.json, verify_on_mac.py (the checking script), golden.npz (its reference logits,
see golden.py) and Generate.swift. verify_on_mac.py is copied as it is, so it imports only the standard library, numpy
and coremltools.
"""
