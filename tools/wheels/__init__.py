"""Wheels with compiled CPU kernels: built, audited, installed where no compiler is, and tested a level at a time."""
