"""Exact seconds, bytes and bounds of a decided structure."""
