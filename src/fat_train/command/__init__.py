"""One file a command; the order of its lines is the order of events."""
