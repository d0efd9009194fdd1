"""Arms that are compared: what they are, their runs, and what the runs say."""
