"""Rows: from files, hubs and the machine's own texts to token ids, and who holds which."""
