"""The LayerSkip recipe, its trainer, and training data."""
