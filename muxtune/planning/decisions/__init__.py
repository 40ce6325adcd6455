"""Decisions of a plan, and the dynamic programme that partitions tasks into contiguous groups."""
