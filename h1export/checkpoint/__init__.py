"""The checkpoint that a user brings: safetensors files, prequantized GPTQ weights, Hub ids and the tokenizer.

Read ``store.py`` first: WeightStore checks every tensor against the architecture and reads it lazily.
``weight_expr.py`` says how the initializers of a graph are made of those tensors.
"""
