"""Explicit feature maps: finite-dimensional Phi whose inner products are a kernel's values, or close to them."""
