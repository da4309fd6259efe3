"""The verification of kernels on this machine, and the timing of their plans."""
