"""Calls of networks, text encoders, autoencoders and pipelines, and the schedulers they are sampled with."""
