"""Small encoders in the format of sentence-transformers, written by it. Needs the extra `st`."""

import tempfile
from pathlib import Path

import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modules import Dense, Transformer
from sentence_transformers.sentence_transformer.modules import Pooling

from support.encoders import SMALL, small_encoder, small_tokenizer

PROMPTS = {"query": "w90 w91 ", "document": "W92 "}
DENSE = 12


def save_sentence_encoder(folder: Path, *, pooling: str = "cls", default_prompt: str | None = None) -> Path:
    """Write an encoder with a dense layer, prompts, max_seq_length 16 and lower case; returns the folder."""
    with tempfile.TemporaryDirectory() as plain:
        small_encoder("bert").save_pretrained(plain)
        tokenizer = small_tokenizer()
        tokenizer.backend_tokenizer.normalizer = None  # so that lower case is up to the pipeline
        tokenizer.save_pretrained(plain)
        torch.manual_seed(3)
        modules = [
            Transformer(plain),
            Pooling(SMALL["hidden_size"], pooling),
            Dense(SMALL["hidden_size"], DENSE),
        ]
        model = SentenceTransformer(modules=modules, prompts=PROMPTS, default_prompt_name=default_prompt, device="cpu")
        model.save_pretrained(str(folder), create_model_card=False)
    # as versions before 6 write it
    (folder / "sentence_bert_config.json").write_text('{"max_seq_length": 16, "do_lower_case": true}')
    return folder
