"""Encode a corpus of any size into shards; index and search them.

Import the modules directly: `inputs` and `folder` do not import torch, so that commands can validate arguments first.
"""
