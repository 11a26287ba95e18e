"""Teacher against student: evaluators, validation while training, the final table of scores."""
