"""Differential privacy: how much noise a budget needs, what was spent, and where the noise comes from."""
