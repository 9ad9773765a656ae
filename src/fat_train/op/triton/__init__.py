"""Kernels for CUDA devices. Only what is chosen is imported: Triton is not on every system."""
