"""The laws of weights."""
