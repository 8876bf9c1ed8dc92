"""Side wing: the same weights and inputs through cfjax and through PyTorch, told apart in one table."""
