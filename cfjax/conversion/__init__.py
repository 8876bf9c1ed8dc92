"""Conversion of weights between layouts by strict tables; runs no network."""
