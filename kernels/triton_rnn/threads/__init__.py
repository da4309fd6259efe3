"""Families of kernels whose threads each own cells, with W_hh in registers and products in inline assembly."""
