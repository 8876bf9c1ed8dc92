"""L1: layers, and who may see whom."""
