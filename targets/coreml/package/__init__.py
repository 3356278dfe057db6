"""The .mlpackage on disk: writing (writer.py) and checking (lint.py)."""
