"""Every random decision as a pure function: order, batches, views, augmentations."""
