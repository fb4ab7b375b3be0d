"""The LayerSkip recipe, the trainer that follows it, and the texts it learns from."""
