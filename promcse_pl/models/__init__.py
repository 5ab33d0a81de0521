"""The prompt encoder: frozen backbone, deep prompt, attention, pooling and head; finds and reads encoders of transformers.

May import losses, data, config and utils.
"""
