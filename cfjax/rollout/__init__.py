"""L3: block-autoregressive generation."""
