"""The layer graph and its two frontends."""
