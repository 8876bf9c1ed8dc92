"""Metrics on generated videos."""
