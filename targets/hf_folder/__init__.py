"""What targets share that write a folder in Hugging Face layout: safetensors shards with an index, and config.json."""
