"""Custom operations, one folder each: a plain reference next to everything that accelerates it."""
