"""Many requests, one language engine: who waits, who runs, and what comes back."""
