"""Subscribers of the engine's events: logs, metrics, traces."""
