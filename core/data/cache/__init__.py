"""Caches of what the frozen networks say: latents, embeddings and trajectories of the teacher."""
