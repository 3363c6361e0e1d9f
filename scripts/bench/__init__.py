"""Measurements against other software, and what their tests import."""
