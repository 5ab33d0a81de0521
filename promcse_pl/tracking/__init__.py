"""Tracking: the local history and Weights & Biases, which is written by a separate process.

Imports the configuration, the names in a run folder and utils; wandb only in functions that run in that process.
"""
