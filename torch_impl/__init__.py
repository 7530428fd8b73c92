"""PyTorch reference implementations. Imports no jax."""
