"""Facts that ship with the project."""
