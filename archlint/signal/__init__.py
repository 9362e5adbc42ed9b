"""The signal engine: moments, activations, propagation, structure."""
