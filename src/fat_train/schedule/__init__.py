"""Learning-rate schedules, by update."""
