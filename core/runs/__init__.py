"""A run, start to end: building its components, executing it, exporting, publishing, opening a finished one."""
