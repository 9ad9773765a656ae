"""The DALI back end; the only place that imports `nvidia.dali`, which not every machine has."""
