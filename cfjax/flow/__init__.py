"""L1: diffusion mathematics on arrays, sigma in [0, 1]; independent of models."""
