"""The vocabulary of the layer graph in torch, a family of ops a file."""
