"""Leap distillation, and figures as a table: a method and a tracker for distill."""
