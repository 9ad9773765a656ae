"""Our parts beside others of their kind, on one machine, in one run: a file a subject."""
