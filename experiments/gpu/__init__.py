"""Checks of kernels, attention, losses and runs on a GPU, in one report."""
