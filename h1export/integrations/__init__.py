"""h1export inside other people's tools.

A module here imports its host, so it is imported by the host, or where the host is installed.
"""
