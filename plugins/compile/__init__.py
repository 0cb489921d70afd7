"""Ahead-of-time compilation of the kernels, on a machine without a GPU."""
