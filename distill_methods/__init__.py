"""Distillation methods: a paper's algorithm in one file each."""
