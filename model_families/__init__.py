"""Model families: a teacher architecture and how to talk to it; one file each."""
