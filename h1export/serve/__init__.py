"""Serve artifacts over HTTP in the form of OpenAI's API: start with server.py."""
