"""Vision transformers, which read an image and choose a class."""
