"""Engines carry briefs to clients: `local` in this process, others over a network."""
