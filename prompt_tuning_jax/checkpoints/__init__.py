"""Models, prompts and training states on disk, in one module per format."""
