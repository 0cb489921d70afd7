"""Images of requests: cut where they come in, encoded in a thread of their own, kept by content."""
