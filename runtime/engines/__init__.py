"""Backends that run a graph: one interface, and the door to those that are installed."""
