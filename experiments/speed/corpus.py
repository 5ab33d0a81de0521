"""Speed of `PromCSE.encode`, `encode_corpus`, and one and two Ray workers (one thread each), in interleaved runs.

Usage: python experiments/speed/corpus.py ADAPTER FILE.txt [TEXTS]

Every way encodes a third of the texts, then all: the difference is free of the start of the workers, who load the adapter.
"""

import json
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from itertools import count
from pathlib import Path
from unittest.mock import patch

import torch

from promcse_pl import PromCSE
from promcse_pl.corpus.encode import encode_corpus
from promcse_pl.interop import ray as engine
from promcse_pl.utils.ray_cluster import ray_cluster

FILES = 4


def seconds(function: Callable[[], object]) -> float:
    """Return the wall time of a call."""
    start = time.monotonic()
    function()
    return time.monotonic() - start


def write_corpus(folder: Path, texts: list[str]) -> Path:
    """Write texts to several files of a folder and return it."""
    folder.mkdir()
    for number in range(FILES):
        (folder / f"{number}.txt").write_text("".join(f"{text}\n" for text in texts[number::FILES]), encoding="utf-8")
    return folder


def main() -> None:
    """Print one JSON line per call: name, number of texts, seconds."""
    adapter, file, most = sys.argv[1], Path(sys.argv[2]), int((*sys.argv, "3072")[3])
    torch.set_num_threads(1)
    model, texts = PromCSE.load(adapter, device="cpu"), file.read_text(encoding="utf-8").splitlines()[:most]
    here, names = Path(tempfile.mkdtemp()), count()
    corpora = {size: write_corpus(here / f"texts-{size}", texts[:size]) for size in (most // 3, most)}

    def on_ray(workers: int, size: int) -> None:
        with patch.object(engine, "worker_resources", lambda *_: engine.WorkerResources(workers, 1, 0)):
            encode_corpus(model, [corpora[size]], here / f"{next(names)}", engine=engine.RayCorpusEngine(adapter))

    calls: dict[str, Callable[[int], object]] = {
        "encode": lambda size: model.encode(texts[:size]),
        "encode_corpus": lambda size: encode_corpus(model, [corpora[size]], here / f"{next(names)}"),
        "1 worker": partial(on_ray, 1),
        "2 workers": partial(on_ray, 2),
    }
    with ray_cluster(None, "--address "):
        on_ray(2, most // 3)  # the first workers import the package
        for order in (list(calls), list(calls)[::-1]):
            for name in order:
                for size in corpora:
                    print(json.dumps([name, size, seconds(partial(calls[name], size))]), flush=True)


if __name__ == "__main__":
    main()
