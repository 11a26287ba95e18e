"""How files, flags and defaults become one validated configuration; every finding names file, key and remedy."""
