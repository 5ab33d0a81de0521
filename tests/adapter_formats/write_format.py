"""Write tests/adapter_formats/formatN, N the current format: an adapter with its small encoder inside, and its vectors.

Run it once when the format grows, before the release. A folder stays as the first version of its format wrote it.
PYTHONPATH=tests python tests/adapter_formats/write_format.py
"""

import dataclasses
import json
import tempfile
from pathlib import Path

import torch
from support.encoders import save_small_encoder

from promcse_pl.adapter import BUNDLED, FORMAT, save_adapter
from promcse_pl.embedder import PromCSE
from promcse_pl.models.backbone import FrozenBackbone
from promcse_pl.models.encoder import PromptEncoder
from promcse_pl.models.pipeline import TextSettings

HERE = Path(__file__).resolve().parent / f"format{FORMAT}"
SENTENCES = ["w5 w6", "W7 w8 w9 w10 w11 w12", "w5"]

if __name__ == "__main__":
    HERE.mkdir()  # fails if it is there already
    with tempfile.TemporaryDirectory() as folder:
        backbone = FrozenBackbone.load(str(save_small_encoder(Path(folder))))
        backbone.identity = dataclasses.replace(backbone.identity, name=BUNDLED)
        torch.manual_seed(0)
        text = TextSettings(max_length=5, lower_case=True, prompts={"query": "Q: "}, default_prompt="query")
        settings = {"kind": "input", "pooling": "cls+avg", "head": "low_rank", "head_rank": 2, "text": text}
        encoder = PromptEncoder(backbone, length=3, **settings)
        torch.nn.init.normal_(encoder.prompt.embedding.weight)
        torch.nn.init.normal_(encoder.head.up.weight)
        save_adapter(encoder, HERE / "adapter", training={"steps": 0})
    vectors = PromCSE.load(HERE / "adapter", device="cpu").encode(SENTENCES)
    (HERE / "vectors.json").write_text(json.dumps({"sentences": SENTENCES, "vectors": vectors.tolist()}) + "\n")
