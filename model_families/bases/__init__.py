"""What families of one kind share: the classes that they are made from, and students on disk."""
