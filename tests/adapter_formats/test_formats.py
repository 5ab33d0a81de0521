"""Adapters that earlier versions wrote are read by this one."""

import json
from pathlib import Path

import numpy as np
import pytest

from promcse_pl.embedder import PromCSE

FORMATS = sorted(Path(__file__).parent.glob("format*/adapter"))


@pytest.mark.parametrize("folder", FORMATS, ids=lambda folder: folder.parent.name)
def test_an_adapter_of_every_format_gives_the_vectors_it_gave(folder):
    expected = json.loads((folder.parent / "vectors.json").read_text())
    vectors = PromCSE.load(folder, device="cpu").encode(expected["sentences"])
    np.testing.assert_allclose(vectors, expected["vectors"], atol=1e-6)


def test_there_is_an_adapter_of_every_format_so_far():
    from promcse_pl.adapter import FORMAT

    assert [folder.parent.name for folder in FORMATS] == [f"format{number}" for number in range(1, FORMAT + 1)]
