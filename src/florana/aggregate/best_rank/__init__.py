"""The adapter of a given rank nearest to the true sum: one file per way to find it."""
