"""What runs in another environment's Python: one script that imports nothing of cfjax."""
