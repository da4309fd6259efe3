"""Which backend runs a call, and by which kernels: decided once for each kind of call, then looked up."""
