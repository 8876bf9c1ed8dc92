"""Live streams for many clients from one device: docs/serving.md."""
