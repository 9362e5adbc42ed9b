"""Backward transfer functions, one file an op family; each file registers what it holds."""
