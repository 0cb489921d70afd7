"""The paper's efficiency tables, counted and measured with this project's own graphs."""
