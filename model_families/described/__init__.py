"""Pipelines without a family: described, compared with their own calls, written as a family."""
