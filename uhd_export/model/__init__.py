"""The model in PyTorch, its exact folding, and the reference that parity is measured against."""
