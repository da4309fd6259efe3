"""The choice of the backend that runs a call, and of its kernels: made once for each kind of call, then looked up."""
