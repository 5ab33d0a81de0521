"""Files that cannot be read twice, such as FIFOs, are rejected before they are opened."""

import os
import shutil
import socket
import threading
from pathlib import Path

import pytest

from promcse_pl.cli.main import main
from promcse_pl.config import DataConfig
from promcse_pl.data.pairs import STSB_FILES, load_stsb
from promcse_pl.data.readers import read_rows, read_scored_pairs
from promcse_pl.data.sources import check_training_file, dev_set
from promcse_pl.evaluation.cxc import PAIRS, load_cxc
from promcse_pl.evaluation.tasks import load_tasks
from promcse_pl.evaluation.transfer_data import load_transfer
from promcse_pl.utils.errors import DataError

READERS = {
    "training rows": ("my.csv", lambda path: list(read_rows(path, width=2))),
    "gzipped rows": ("my.jsonl.gz", lambda path: list(read_rows(path, width=2))),
    "parquet": ("my.parquet", lambda path: list(read_rows(path, width=2))),
    "scored pairs": ("my.tsv", read_scored_pairs),
    "data.train": ("my.csv", lambda path: check_training_file(DataConfig(kind="pairs", train=str(path)), 0)),
    "data.dev": ("my.csv", lambda path: dev_set(DataConfig(kind="pairs", train="demo", dev=str(path)))),
    "task": ("my.csv", lambda path: load_tasks([str(path)], None)),
    "STS-B": (f"STS/STSBenchmark/{STSB_FILES['dev']}", lambda path: load_stsb(path.parents[2], "dev")),
    "CxC": (PAIRS, lambda path: load_cxc(path.parent)),
    "transfer": ("MR/rt-polarity.pos", lambda path: load_transfer(path.parents[1], "MR")),
}


@pytest.mark.parametrize("reader", READERS)
def test_a_pipe_is_rejected_without_blocking(reader, tmp_path):
    name, read = READERS[reader]
    path = tmp_path / name
    path.parent.mkdir(parents=True, exist_ok=True)
    os.mkfifo(path)
    raised: list[Exception] = []

    def call() -> None:
        try:
            read(path)
        except DataError as error:
            raised.append(error)

    thread = threading.Thread(target=call, daemon=True)
    thread.start()
    thread.join(20)
    assert not thread.is_alive(), "it waits for a writer"
    assert str(path) in str(raised[0])
    assert "it is a FIFO, not a regular file" in str(raised[0])


def test_a_device_and_a_socket_are_refused(tmp_path, monkeypatch):
    (tmp_path / "zero.csv").symlink_to("/dev/zero")
    with pytest.raises(DataError, match=r"zero\.csv cannot be read: it is a device, not a regular file"):
        list(read_rows(tmp_path / "zero.csv", width=1))
    monkeypatch.chdir(tmp_path)  # the path of a socket may have some 100 bytes
    server = socket.socket(socket.AF_UNIX)
    server.bind("s.csv")
    with pytest.raises(DataError, match=r"s\.csv cannot be read: it is a socket, not a regular file"):
        list(read_rows(Path("s.csv"), width=1))
    server.close()


def test_the_command_line_refuses_a_pipe_by_name_and_says_to_type_a_dash(tmp_path, capsys):
    os.mkfifo(tmp_path / "pipe.txt")
    assert main(["encode", str(tmp_path), str(tmp_path / "pipe.txt"), "--out", "-"]) == 2
    assert "read a pipe given as -" in capsys.readouterr()[1]
    shutil.rmtree(tmp_path)
