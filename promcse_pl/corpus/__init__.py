"""Encode a corpus of any size to a folder of shards, and index and search them.

The modules are imported where they are used: `inputs` and `folder` need no torch, so that commands can check early.
"""
