"""Starts the ranks of a run on this machine, or joins those that torchrun started."""
