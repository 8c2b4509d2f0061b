"""Strategies that spread a model over ranks."""
