"""Import and export: official PromCSE checkpoints, PEFT, sentence-transformers, mteb.

May import the embedder, adapters, models and everything below.
"""
