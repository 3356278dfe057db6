"""The public name of integrations/transformers.py: ``h1export.hf.load(OUT)``."""

from h1export.errors import naming_extras

with naming_extras():
    from h1export.integrations.transformers import FalconH1ForCausalLM, load

__all__ = ["FalconH1ForCausalLM", "load"]
