"""Comparisons: methods x seeds x settings on the same partitions, the table, and the fixed-updates ablation."""
