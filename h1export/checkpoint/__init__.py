"""What users bring: safetensors files, prequantized formats, Hub ids, tokenizers. Start with store.py."""
