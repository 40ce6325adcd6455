"""Micro-batches: how the sequences of an hTask lie in its stream, and how many tokens that takes."""
