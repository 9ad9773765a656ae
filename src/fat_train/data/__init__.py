"""From a folder of images to batches: index, order, pipeline."""
