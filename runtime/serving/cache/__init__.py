"""One key-value cache of several rows, and which request has which row."""
