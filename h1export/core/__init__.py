"""The floor everything stands on: architecture, states, weights, integers, artifacts, reports. Knows no torch and no runtime."""
