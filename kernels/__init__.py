"""The mathematics: kernels as immutable values, on NumPy or CuPy arrays."""
