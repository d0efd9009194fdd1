"""Plans for chips that need not be there: compile a step, read the program, say what bounds it."""
