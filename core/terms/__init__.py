"""Loss terms that methods are made of: pure functions of tensors, each with its equation."""
