"""What a build leaves on disk: manifest, staging, journal, weight files, inspection. Start with artifact.py."""
