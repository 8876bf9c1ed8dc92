"""Data sources and datasets of latents."""
