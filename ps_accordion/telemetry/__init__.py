"""What a run leaves behind: events and metrics as JSON lines, one name for one thing."""
