"""Measurements of gradients, states and the process: small functions of NumPy arrays, the same for both frameworks."""
