"""The embedded model: a few megabytes in the official format, trained to read small print."""
