"""The frozen encoder and the trained prompt; all contact with transformers."""
