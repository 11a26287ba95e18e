"""The parts that plugins implement and import: the base classes of every kind, the batch, the context, the hooks."""
