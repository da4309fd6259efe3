"""What the kernels compile to on every architecture, without a GPU: a tool for whoever changes them."""
