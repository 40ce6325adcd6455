"""What the search is held against: the best of all partitions of a few tasks."""
