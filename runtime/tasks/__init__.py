"""Tenants: their adapters, optimizers, losses, checkpoints and files."""
