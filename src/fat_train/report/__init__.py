"""Curves and tables of a run."""
