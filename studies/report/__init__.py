"""The page of a run: one HTML file with its curves, its tables, and what was played."""
