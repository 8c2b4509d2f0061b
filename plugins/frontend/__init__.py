"""Surfaces for clients: HTTP APIs and pages."""
