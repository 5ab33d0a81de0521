"""The records of W&B's offline files."""

import json
import struct
import time
from pathlib import Path

from wandb.proto.wandb_internal_pb2 import Record

from promcse_pl.config import Config
from support.encoders import save_small_encoder


def records(folder: Path) -> list[Record]:
    """Read the .wandb file of a closed run; W&B's own process writes the end a moment after `finish` has returned."""
    (path,) = folder.glob("wandb/offline-run-*/run-*.wandb")
    patience = time.monotonic() + 20
    while True:
        found = parse(path.read_bytes())
        if any(record.HasField("exit") for record in found) or time.monotonic() > patience:
            return found
        time.sleep(0.1)


def parse(content: bytes) -> list[Record]:
    """Read a 7-byte head, then LevelDB's log: blocks of 32 KiB of chunks (crc 4, length 2, type 1, data)."""
    assert content.startswith(b":W&B")
    found, parts, position = [], b"", 7
    while position + 7 <= len(content):
        if (left := 32768 - position % 32768) < 7:
            position += left
            continue
        length, kind = struct.unpack_from("<HB", content, position + 4)
        parts += content[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4) and position <= len(content):  # whole, or the last chunk
            found.append(Record.FromString(parts))
            parts = b""
    return found


def items(part) -> dict:
    """Key -> value of a list of updates."""
    return {"/".join(item.nested_key) or item.key: json.loads(item.value_json) for item in part}


def tracked_config(folder: Path, wandb_mode: str) -> Config:
    save_small_encoder(folder / "encoder")
    train = folder / "train.csv"
    train.write_text("a,b,c\n" + "".join(f"w{row} w7,w{row} w8,w{row + 40}\n" for row in range(5, 15)))
    data = {
        "kind": "triplets",
        "train": str(train),
        "batch_size": 4,
        "max_length": 16,
        "cache_dir": str(folder / "cache"),
    }
    return Config.from_dict(
        {
            "model": {"path": str(folder / "encoder")},
            "data": data,
            "trainer": {"epochs": 1, "precision": "float32", "device": "cpu"},
            "tracking": {"wandb": wandb_mode},
        }
    )
