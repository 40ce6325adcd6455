"""Schedules: the actions of every stage in order, how long they take, and traces of them."""
