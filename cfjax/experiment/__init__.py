"""From configs to values, here only: data, stage, networks, runs and their records."""
