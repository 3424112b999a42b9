"""cosmos_kernels."""
