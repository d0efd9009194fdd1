"""What was measured of programs: times, memory, errors, plans, answers."""
