"""Comparisons: methods x seeds x settings on the same partitions, the table, and the swap test."""
