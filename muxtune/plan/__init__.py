"""The plan: its content, its check, its file, and what it predicts."""
