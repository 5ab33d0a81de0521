"""Where numbers go: the local history and W&B."""
