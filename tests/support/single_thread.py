"""Limits torch to one thread when it is imported: results are compared by bits, and the encoders are so small that threads slow
them down. Child processes import this module through the others, but not conftest.py.
"""

import torch

torch.set_num_threads(1)
