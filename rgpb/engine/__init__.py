"""What runs a loss: the plan, the chunk loops, the operators registered with PyTorch."""
