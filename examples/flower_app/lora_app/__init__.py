"""A plain Flower app: LoRA on a tiny causal language model."""
