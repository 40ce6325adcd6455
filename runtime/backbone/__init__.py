"""The frozen backbone: its families, its weights, and the stage of it that a rank holds."""
