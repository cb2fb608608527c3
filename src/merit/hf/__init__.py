"""The Hugging Face side: the base, checkpoints, model families, batches, the hub."""
