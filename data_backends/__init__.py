"""Data backends: where samples and caches live; one file each."""
