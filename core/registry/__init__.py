"""Where plugins come from, what they are called, and whose code an error came from."""
