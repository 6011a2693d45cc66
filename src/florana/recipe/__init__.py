"""The recipe: what a run is, as TOML, checked whole before anything starts."""
