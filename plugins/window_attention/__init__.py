"""Window attention: pooled rows of all levels in a window, attended by folded queries."""
