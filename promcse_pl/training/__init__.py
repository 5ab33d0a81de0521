"""Training with Lightning: module, callbacks, checkpoints, machine, ranks. May import tracking and the packages below it."""
