"""CxC-STS: semantic similarity of MS-COCO captions (Parekh et al. 2021), with the bootstrap of the PromCSE paper.

Each of 1000 resamples draws half as many MS-COCO test images as there are, with replacement, and one rated pair of each
image. The score is the mean of the resamples' Spearman correlations; their standard deviation is reported too.
"""

# n rated pairs, i images, b resamples

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import ArrayLike, NDArray

from promcse_pl.data.columns import is_number
from promcse_pl.data.files import read_text, single_spaced
from promcse_pl.data.pairs import ScoredPairs
from promcse_pl.evaluation.statistics import CountedSpearman
from promcse_pl.utils.errors import DataError

PAIRS, IMAGES = "cxc-sts-test.csv", "dataset_coco_with_cxc.json"
COLUMNS = ("caption1", "caption2", "agg_score", "sampling_method", "sent1", "sent2")
RESAMPLES, SEED = 1000, 123
"""Resamples and seed (of numpy's legacy generator) of the published numbers."""
BLOCK = 10
"""Resamples between two reports of progress."""
WHERE = (
    f"CxC-STS needs two files in data.dir/cxc. {PAIRS}, header {','.join(COLUMNS)}: sts_test.csv of Crisscrossed Captions "
    "(github.com/google-research-datasets/Crisscrossed-Captions) with the two sentences added. "
    f'{IMAGES}, {{"images": [{{"split": "test", "cxc_scores": [[caption1, caption2], ...]}}, ...]}}: made by the setup '
    "script there from Karpathy's dataset_coco.json"
)


@dataclass(frozen=True, slots=True)
class CxcData:
    """The rated pairs and the images they belong to.

    Attributes:
        pairs: The rows of the csv.
        ids: Number of each row's caption pair, from 0; rows of the same captions share it.
        images: Numbers of the rated pairs of each MS-COCO test image.
        files: Rows or images, and sha256, of each file by its name.
    """

    pairs: ScoredPairs
    ids: tuple[int, ...]
    images: tuple[tuple[int, ...], ...]
    files: dict[str, tuple[int, str]]


def load_cxc(folder: str | Path) -> CxcData:
    """Read the two files of CxC-STS.

    Raises:
        DataError: A file is missing (the message says where it comes from) or broken, or a pair of the json is not in the csv.
    """
    folder = Path(folder)
    pairs, keys = _read_pairs(folder / PAIRS)
    numbers = {key: number for number, key in enumerate(dict.fromkeys(keys))}
    images, digest = _read_images(folder / IMAGES, numbers)
    files = {PAIRS: (len(pairs), pairs.sha256), IMAGES: (len(images), digest)}
    return CxcData(pairs, tuple(numbers[key] for key in keys), images, files)


def _read_pairs(path: Path) -> tuple[ScoredPairs, tuple[tuple[str, str], ...]]:
    text, digest = read_text(path, WHERE, "utf-8-sig")
    reader = csv.reader(text.splitlines(keepends=True))
    header = next(reader, [])
    if tuple(header) != COLUMNS:
        raise DataError(f"{path}:1: the header must be {','.join(COLUMNS)}, got {','.join(header)}")
    rows, keys = [], []
    for cells in reader:
        where = f"{path}:{reader.line_num}"
        if len(cells) != len(COLUMNS):
            raise DataError(f"{where}: expected {len(COLUMNS)} columns, got {len(cells)}")
        caption1, caption2, score, _, sent1, sent2 = cells
        if not is_number(score):
            raise DataError(f"{where}: agg_score {score!r} is not a finite number")
        rows.append((single_spaced(sent1), single_spaced(sent2), float(score)))
        keys.append((caption1, caption2))
    return ScoredPairs.of("CxC-STS", rows, digest), tuple(keys)


def _read_images(path: Path, numbers: dict[tuple[str, str], int]) -> tuple[tuple[tuple[int, ...], ...], str]:
    text, digest = read_text(path, WHERE, "utf-8-sig")
    try:
        rated = [image["cxc_scores"] for image in json.loads(text)["images"] if image["split"] == "test"]
        named = [[(str(first), str(second)) for first, second, *_ in image] for image in rated]
    except (ValueError, TypeError, LookupError) as error:
        raise DataError(f"{path} has another form ({type(error).__name__}: {error}). {WHERE}") from error
    for number, image in enumerate(named):
        if not image:
            raise DataError(f"{path}: test image {number} (from 0) has no rated pair")
        for key in image:
            if key not in numbers:
                raise DataError(
                    f"{path}: test image {number} (from 0) names the pair {key}, which {PAIRS} does not have"
                )
    if len(named) < 4:
        raise DataError(f"{path} has {len(named)} test images; half of them must be two or more")
    return tuple(tuple(numbers[key] for key in image) for image in named), digest


def cxc_bootstrap(
    predicted: ArrayLike,
    data: CxcData,
    *,
    resamples: int = RESAMPLES,
    seed: int = SEED,
    progress: Callable[[int], None] | None = None,
) -> NDArray[np.float64]:
    """Return the Spearman correlation of every resample, (resamples,) in [-1, 1].

    With the defaults the draws are those of the published numbers: numpy's legacy generator gives the images of a resample and
    then, image by image, the pair.

    Args:
        predicted: Cosine of each row of the csv.
        data: The pairs and images.
        resamples, seed: Number of resamples and seed of their draws.
        progress: Called with the number of resamples done so far.
    """
    score = CountedSpearman(predicted, data.pairs.gold)
    id_of_row_n = np.array(data.ids)
    rng = np.random.RandomState(seed)  # not default_rng: the published numbers come from this one
    pairs_of_image_i = np.array([len(image) for image in data.images])
    first_of_image_i = np.concatenate([[0], np.cumsum(pairs_of_image_i)[:-1]])
    id_of_pair = np.array([pair for image in data.images for pair in image])
    values_b = np.empty(resamples)
    for done in range(resamples):
        images = rng.randint(0, len(data.images), size=len(data.images) // 2)
        drawn = id_of_pair[first_of_image_i[images] + rng.randint(0, pairs_of_image_i[images])]
        counts_n = np.bincount(drawn, minlength=id_of_row_n.max() + 1)[id_of_row_n]
        values_b[done] = score(counts_n[None])[0]
        if progress is not None and (done + 1) % BLOCK == 0:
            progress(done + 1)
    return values_b
