"""What runs a loss: the call, its plan, the sweeps and their operators."""
