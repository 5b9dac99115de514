"""The frozen T5: its configuration, its layers and its forward pass."""
