"""Explicit features: what maps learn, the features as they stream by, and what is planned and solved with them."""
