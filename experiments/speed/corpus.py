"""Speed of `encode_corpus` and `PromCSE.encode`, and of one and two Ray workers (one thread each), in interleaved runs.

Usage: python experiments/speed/corpus.py ADAPTER FILE.txt [TEXTS]
"""

import json
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from itertools import count as count_up
from pathlib import Path
from unittest.mock import patch

import psutil
import torch

from promcse_pl import PromCSE
from promcse_pl.corpus.encode import encode_corpus
from promcse_pl.interop import ray as engine
from promcse_pl.utils.ray_cluster import ray_cluster


def cpu_seconds() -> float:
    """Return the CPU time of this process and of its Ray workers, idle ones included."""
    total = time.process_time()
    for child in psutil.Process().children(recursive=True):
        with suppress(psutil.Error):
            if " ".join(child.cmdline()).startswith(("ray::promcse encode", "ray::IDLE")):
                total += sum(child.cpu_times()[:2])
    return total


def seconds(function: Callable[[], object]) -> tuple[float, float]:
    """Return the wall time and the CPU time of a call."""
    wall, cpu = time.monotonic(), cpu_seconds()
    function()
    return time.monotonic() - wall, cpu_seconds() - cpu


def main() -> None:
    """Print one JSON line per call: name, wall seconds, CPU seconds."""
    adapter, file, count = sys.argv[1], Path(sys.argv[2]), int((*sys.argv, "4096")[3])
    torch.set_num_threads(1)
    model, texts = PromCSE.load(adapter, device="cpu"), file.read_text().splitlines()[:count]
    folder = Path(tempfile.mkdtemp())
    for number in range(4):
        (folder / f"part-{number}.txt").write_text("".join(f"{text}\n" for text in texts[number::4]))
    (folder / "all.txt").write_text("".join(f"{text}\n" for text in texts))
    names = count_up()

    def on_ray(workers: int) -> None:
        with patch.object(engine, "worker_resources", lambda *_: engine.WorkerResources(workers, 1, 0)):
            encode_corpus(
                model, [f"{folder}/part-*"], folder / f"{next(names)}", engine=engine.RayCorpusEngine(adapter)
            )

    calls = {
        "encode": lambda: model.encode(texts),
        "encode_corpus": lambda: encode_corpus(model, [folder / "all.txt"], folder / f"{next(names)}"),
        "1 worker": lambda: on_ray(1),
        "2 workers": lambda: on_ray(2),
    }
    order = ("encode", "encode_corpus", "encode_corpus", "encode")
    for name in order:
        print(json.dumps([name, *seconds(calls[name])]), flush=True)
    with ray_cluster(None, "--address "):
        on_ray(2)  # both workers load the adapter
        order = ("1 worker", "2 workers", "2 workers", "1 worker")
        for name in order:
            print(json.dumps([name, *seconds(calls[name])]), flush=True)


if __name__ == "__main__":
    main()
