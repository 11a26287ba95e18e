"""Data: backend -> index -> buckets -> caches -> batches. :class:`.pipeline.DataPipeline` is the whole of it."""
