"""Families of kernels whose threads own a cell each, with W_hh in registers, in inline assembly."""
