"""Planning for chips that are not attached: compiles a step and reports what bounds it."""
