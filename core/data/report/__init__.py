"""The report on a dataset: its figures, its charts, what was left out and why."""
