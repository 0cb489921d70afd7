"""The folder that is served: its manifest, and whether its files are those listed."""
