"""L4: one file per section of the paper."""
