"""Fits the coefficients of the device models in :mod:`muxtune.costs` to measurements."""

__all__: list[str] = []
