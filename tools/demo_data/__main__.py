"""Write the demo data of the package: `make demodata`."""

from __future__ import annotations

import csv
import gzip
import io
from collections.abc import Iterable, Sequence
from pathlib import Path

from demo_data.generate import demo_pairs, demo_triplets

FOLDER = Path(__file__).parents[2] / "promcse_pl/data/demo_data"


def csv_gz(header: Sequence[str], rows: Iterable[Sequence[object]]) -> bytes:
    """Return a gzipped csv file; the gzip header holds neither time nor name, so that equal rows give equal bytes."""
    text = io.StringIO(newline="")
    csv.writer(text, lineterminator="\n").writerows([header, *rows])
    compressed = io.BytesIO()
    with gzip.GzipFile(filename="", mode="wb", fileobj=compressed, mtime=0) as file:
        file.write(text.getvalue().encode())
    return compressed.getvalue()


def demo_files() -> dict[str, bytes]:
    """Return the content of each file by its name."""
    pair_header = ("sentence1", "sentence2", "score")
    return {
        "train.csv.gz": csv_gz(("anchor", "positive", "negative"), demo_triplets()),
        "dev.csv.gz": csv_gz(pair_header, demo_pairs("dev")),
        "test.csv.gz": csv_gz(pair_header, demo_pairs("test")),
    }


if __name__ == "__main__":
    FOLDER.mkdir(exist_ok=True)
    for name, content in demo_files().items():
        (FOLDER / name).write_bytes(content)
