"""The model: its layers by ranges, their cache, their faster forms, and how it is loaded."""
