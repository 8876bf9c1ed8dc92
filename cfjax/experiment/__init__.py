"""Configs become values here, and nowhere else: data, stage, networks, runs and what is known of them."""
