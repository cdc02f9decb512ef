"""From a profile to a Dask client."""
