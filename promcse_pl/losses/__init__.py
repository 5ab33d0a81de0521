"""NT-Xent, energy hinge and their sum with the MLM loss: pure functions on (B, D) tensors. May import config and utils."""
