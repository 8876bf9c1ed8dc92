"""L5: state, updates, checkpoints, the loop."""
