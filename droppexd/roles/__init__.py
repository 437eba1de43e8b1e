"""The three roles. They never import each other, and are handed all that they touch."""
