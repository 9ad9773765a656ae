"""Saving, loading, and what travels beside the weights."""
