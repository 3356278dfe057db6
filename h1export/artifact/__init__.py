"""An artifact on disk: manifest, staging folder, journal, weight files.

Read ``artifact.py`` first (what a finished folder is), then ``manifest.py`` (what its manifest records).
``staging.py``, ``journal.py`` and ``weight_file.py`` show how a build writes a folder that a kill cannot damage.
"""
