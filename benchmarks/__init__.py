"""Measurements of speed and accuracy: one question per script, printed tables, no assertions."""
