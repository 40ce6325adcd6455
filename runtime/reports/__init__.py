"""What a run tells: times, bytes, validation against the plan, losses against solo runs."""
