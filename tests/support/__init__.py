"""Helpers that several test modules share. Test modules import nothing from each other."""

import torch

torch.set_num_threads(
    1
)  # in child processes too, which import this package but not conftest.py: results are compared by bits
