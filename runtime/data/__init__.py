"""Micro-batches as tensors, and the feed that deals them to the steps of a plan."""
