"""Experiments: the only part that computes with weights."""
