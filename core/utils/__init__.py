"""Small helpers that know nothing of diffusion: files, threads, seeds, devices, memory, trees of tensors, packages."""
