"""The command line: one module a command, each a call into a room."""
