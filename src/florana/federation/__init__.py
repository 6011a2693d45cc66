"""The one round loop that every engine shares: sampling, the gate, the journal, the accounting. No training."""
