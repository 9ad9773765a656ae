"""The backbones, one readable file a family."""
