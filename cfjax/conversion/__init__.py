"""Weights in other people's layouts: strict tables, and nothing that runs a network."""
