"""Whether a kernel computes the right numbers here, and which plan of several is the fastest."""
