"""The planning problem: meshes, layouts and schedules to choose from, and the limit of memory."""
