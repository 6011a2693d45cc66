"""florana in a user's own Flower app: its strategy, its clients' helpers, its records."""
