"""The batch system that a run is a job of."""
