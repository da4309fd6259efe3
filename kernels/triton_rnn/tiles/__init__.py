"""Families of kernels whose programs compute tiles of sequences and units, in Triton's own words."""
