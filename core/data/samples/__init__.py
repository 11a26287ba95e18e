"""One sample: its image, its captions, its size and crop, what is wrong with its file."""
