"""The search for the fastest structure, from proposals to played schedules."""
