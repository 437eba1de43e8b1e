"""The catalogue: an ordered key-value interface, its engines, and the files and extents on top."""
