"""Partitions beyond contiguous groups: all of them, or those that a local search reaches."""
