"""The device of a rank: its clock, its memory, and what the process takes."""
