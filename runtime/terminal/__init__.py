"""Everything that prints to a terminal or asks at one."""
