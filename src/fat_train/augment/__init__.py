"""The recipe's augmentation as values, and the part of it that runs on the training device."""
