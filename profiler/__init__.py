"""Measures what operators and collectives cost on a device."""

from profiler.session import profile_model

__all__ = ["profile_model"]
