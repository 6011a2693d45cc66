"""Rules that say how much each client's change counts before a strategy sums it up. One file per rule."""
