"""Files for the Mac: start with readme.py, which writes them into an artifact."""
