"""The harness that judges artifacts. It sees Runners and a reference, never a target."""
