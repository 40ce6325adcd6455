"""Errors of the shipped device models, as tables and pictures."""
