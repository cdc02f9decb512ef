"""Data, tiles, stores, solves: everything between a kernel and a report."""
