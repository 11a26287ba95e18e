"""Ovis-Image, and images from an SQLite database: a family and a data backend for distill."""
