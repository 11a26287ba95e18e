"""The index: which samples a dataset has, in which bucket, found in files, tables, shards and prompt lists."""
