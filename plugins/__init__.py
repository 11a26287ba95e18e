"""Built-in plugins: trackers, optimizers, evaluators, publishers."""
