"""Checkpoints: found, configured, validated, and read tensor by tensor."""
