"""LoRA's records and their linear algebra: what everything else speaks of. No I/O."""
