"""The LayerSkip recipe, a trainer, and training data."""
