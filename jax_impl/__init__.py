"""Flax NNX ports, page by page beside torch_impl. Imports no torch."""
