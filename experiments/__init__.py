"""Figures, sweeps and demonstrations: what the paper and this project claim."""
