"""The engine: it knows no method, family, backend or plugin by name."""
