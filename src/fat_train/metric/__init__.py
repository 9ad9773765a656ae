"""Counts that stay exact over any number of ranks."""
