"""Small sentence-transformers folders."""

from pathlib import Path

import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.models import Dense, Normalize, Pooling, Transformer

from support.encoders import save_small_encoder
