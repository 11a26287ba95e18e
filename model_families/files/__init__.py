"""Models on disk and on the hub: what they are made of, read and compared with their configs."""
