"""Images of figures: grids of images, charts of data, curves of a run."""
