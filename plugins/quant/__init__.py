"""Quantizers: how the weights of linear layers are stored and applied."""
