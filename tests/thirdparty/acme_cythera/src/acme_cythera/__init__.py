"""Plugins for cythera: the attention backend `attention.acme` and the quantizer `quant.acme`."""
