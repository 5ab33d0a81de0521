"""Measure how time and memory of encoding and of the token cache grow with the number of sentences.

    python experiments/speed/growth.py --data FOLDER

The encoder is small (2 layers of 64), so that the growth dominates. The sentences are FOLDER's Wikipedia text.
Writes growth.json, which `measure.py --draw` puts into README.md.
"""

from __future__ import annotations

import argparse
import itertools
import json
import tempfile
from pathlib import Path

import torch
from machine import describe, in_own_process, peak_bytes, seconds
from rows import NAME
from transformers import AutoConfig, AutoModel

from promcse_pl.data.columns import TRAINING_ROWS
from promcse_pl.data.readers import read_rows
from promcse_pl.data.tokens import file_source, load_tokens
from promcse_pl.embedder import PromCSE
from promcse_pl.models.backbone import FrozenBackbone
from promcse_pl.models.encoder import PromptEncoder
from promcse_pl.models.identity import EncoderId

HERE = Path(__file__).resolve().parent
SIZES = (1_000, 10_000, 100_000, 400_000)
SMALL = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 256}


def measure(what: str, sentences: int, data: Path) -> dict[str, object]:
    tokenizer = FrozenBackbone.load(NAME).tokenizer
    text = [row[0] for row in itertools.islice(read_rows(data / "wiki" / "wiki.txt.gz", width=1), sentences)]
    if what == "encode":
        torch.manual_seed(1)
        small = AutoModel.from_config(AutoConfig.for_model("bert", vocab_size=len(tokenizer), **SMALL))
        backbone = FrozenBackbone(small, EncoderId("small", None, "0" * 64))
        model = PromCSE(PromptEncoder(backbone, length=10, pooling="avg").eval(), tokenizer)
        model.encode(text[:100])
        before = peak_bytes()
        took = seconds(lambda: model.encode(text))
        result = sentences * model.width * 4  # the embeddings
    else:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "text.txt"
            path.write_text("\n".join(text) + "\n", encoding="utf-8")
            del text
            source = file_source(path, kind=TRAINING_ROWS[1], columns=None, header=None, on_bad_row="stop")
            before = peak_bytes()
            took = seconds(lambda: load_tokens(source, tokenizer, max_length=32, cache_dir=Path(folder)))
        result = 0  # on disk
    return {"what": what, "sentences": sentences, "seconds": took, "memory": peak_bytes() - before - result}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--case", nargs=2, metavar=("WHAT", "SENTENCES"), help="measure it in this process")
    options = parser.parse_args()
    data = options.data.resolve()
    if options.case:
        what, sentences = options.case
        print(json.dumps(measure(what, int(sentences), data)))
        return
    cases = [
        in_own_process(__file__, "--data", data, "--case", what, sentences)
        for what in ("encode", "token cache")
        for sentences in SIZES
    ]
    (HERE / "growth.json").write_text(json.dumps({"machine": describe(), "cases": cases}, indent=1) + "\n")


if __name__ == "__main__":
    main()
