"""Run folders in, one self-contained HTML file out."""
