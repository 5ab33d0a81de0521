"""Pure functions on (B, D) tensors."""
