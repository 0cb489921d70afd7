"""A file of questions, answered with all slots busy."""
