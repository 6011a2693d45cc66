"""Runs: a recipe becomes a run folder, and what can be said of one before it starts."""
