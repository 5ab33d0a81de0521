"""Data files to batches: readers, dev and test pairs, the tokenised dataset cache, the DataModule, and the demo data.

May import config and utils, besides torch, Lightning and pyarrow.
"""
