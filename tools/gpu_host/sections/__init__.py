"""One module a section of run.py, with a function ``run(host)`` that yields rows."""
