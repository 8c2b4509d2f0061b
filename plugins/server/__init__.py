"""Servers: what carries front ends to clients."""
