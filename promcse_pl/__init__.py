"""PromCSE: sentence embeddings from a soft prompt on a frozen encoder."""
