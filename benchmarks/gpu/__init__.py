"""Measurements on a GPU: kernels and whole models beside their peers, and the search for tiles.

Run one as `PYTHONPATH=.:tools python -m benchmarks.gpu.kernels`. On a CPU the scripts run the smallest sizes to show
that they work; their figures mean nothing there, and the results are marked as dry.
"""
