"""8-bit linear layers: quantisation, kernels and their references. Knows torch and Triton, nothing of K1."""
