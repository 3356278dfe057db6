"""The harness that says whether an artifact is right: start with run.py. It sees Runners and a reference, never a target."""

from h1export.validate.run import ValidateOptions, judge, validate

__all__ = ["ValidateOptions", "judge", "validate"]
