"""Many callers on one device: continuous batching, its limits, and the doors to it."""
