"""Partitions beyond contiguous groups, by exact prices: groups, their schedules, and local search."""
