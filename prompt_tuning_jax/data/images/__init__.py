"""Labeled images: folders, IDX and npz files, and how they become the pixels of a model."""
