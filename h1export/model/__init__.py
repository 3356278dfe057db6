"""Facts about the model: its architecture, tensors, states and probes. Imports neither torch nor a runtime."""
