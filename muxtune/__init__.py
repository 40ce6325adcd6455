"""Domain of MuxTune: tasks, costs, plans; neither torch nor simpy."""
