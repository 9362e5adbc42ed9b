"""PyTorch models into layer graphs: record one forward as a torch.fx graph, then lower it."""
