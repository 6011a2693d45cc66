"""FLoRA-NA: aggregated factors as fitted sums of the clients' factors. One file per solver."""
