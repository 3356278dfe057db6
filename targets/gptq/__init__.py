"""A Hugging Face folder in GPTQ's layout: start reading in target.py."""
