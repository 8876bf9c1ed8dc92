"""The same weights and inputs through cfjax and through PyTorch, and the differences in one table."""
