"""Bundles: built, checked against the checkpoint, and put in place whole."""
