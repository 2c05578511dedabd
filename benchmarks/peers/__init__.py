"""Other packages for early exits, on the same network, weights and data as aep_ext."""
