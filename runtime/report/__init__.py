"""The profile as files for people: a page with charts, a table for spreadsheets."""
