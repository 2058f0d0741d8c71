"""Studies of the method itself: what it does on data made for the question."""
