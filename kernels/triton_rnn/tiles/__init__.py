"""Families of kernels whose programs compute tiles of sequences and units, by Triton's own operations on tiles."""
