"""A tool for changes of kernels: compile them for every architecture, without a GPU, and report the result."""
