"""What users write, as validated models: the run's keys, a dataset's keys, secrets. Nothing is read from files here."""
