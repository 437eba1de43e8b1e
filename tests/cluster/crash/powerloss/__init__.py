"""Record what real processes ask of their disk, and rebuild what a power cut at any moment may leave of it."""
