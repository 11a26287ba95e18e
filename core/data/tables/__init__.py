"""Columns and tables: memory-mapped arrays, readers of csv, jsonl and Parquet, an external sort."""
