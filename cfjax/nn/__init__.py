"""L1: layers, and attention masks."""
