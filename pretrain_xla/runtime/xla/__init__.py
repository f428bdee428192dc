"""The runtime on PyTorch/XLA."""
