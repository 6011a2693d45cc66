"""Secure aggregation: the server learns a sum over clients, and no single client's part of it."""
