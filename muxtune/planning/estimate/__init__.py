"""Estimates of seconds and bytes for all contiguous groups of tasks at once."""
