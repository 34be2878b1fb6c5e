"""Device code: Triton kernels and the helpers they share."""
