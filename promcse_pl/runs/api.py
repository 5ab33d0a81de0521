"""`promcse_pl.train`: train from Python."""

from __future__ import annotations

import difflib
import json
import re
import signal
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING

from promcse_pl.config import Config
from promcse_pl.data.columns import TRAINING_ROWS, Columns
from promcse_pl.data.tokens import memory_source
from promcse_pl.run_folder import CONFIG, DATA, check_run_folder
from promcse_pl.runs.compose import compose_config, config_groups, recipe_note
from promcse_pl.runs.lifecycle import run_job
from promcse_pl.training.distributed import find_ranks
from promcse_pl.utils.errors import ConfigError, DataError, EncoderError
from promcse_pl.utils.files import write_bytes
from promcse_pl.utils.paths import expand, file_suffix, is_folder, run_command
from promcse_pl.utils.signals import Stopped

if TYPE_CHECKING:
    from pytorch_lightning.callbacks import Callback
    from pytorch_lightning.loggers import Logger

    from promcse_pl.embedder import PromCSE

Row = str | Sequence[str] | Mapping[str, str]


def train(
    data: str | Path | Iterable[Row],
    *,
    model: str | Path = "minilm",
    overrides: Sequence[str] = (),
    callbacks: Sequence[Callback] = (),
    loggers: Sequence[Logger] = (),
    folder: str | Path | None = None,
) -> PromCSE:
    """Train a prompt for a frozen encoder and return the model; `python run.py` does the same from a shell.

    Args:
        data: A file (.csv, .tsv, .txt, .jsonl, .parquet), the name of a data set in conf/data (`demo`, `nli`), or rows in memory:
            sentences, tuples of 1 to 3 texts (anchor, positive, hard negative), or dictionaries (`{"anchor": ..., "positive":
            ...}`). A .txt file contains sentences, other files triplets, unless `data=pairs` or `data=sentences` is in overrides.
        model: Name of a model in conf/model (`minilm`, `bert-base`, `roberta-large`), or the folder or hub id of another encoder,
            which is trained with the recipe of `minilm` unless overridden. Pooling, dense layers, maximum length and prompts of a
            sentence-transformers folder are used.
        overrides: Settings as on the command line, for example `["loss.margin=0.3", "trainer.epochs=1"]`.
        callbacks: Additional Lightning callbacks. Their state is saved in the checkpoints and must be plain values or tensors.
            `python run.py resume=FOLDER` resumes the run without callbacks and loggers and logs a warning that names them.
            `trainer.callback_metrics["dev/spearman"]` (x 100; of a retrieval set `dev/ndcg_at_10`) is updated in
            `on_train_batch_end` of the evaluated steps, so `EarlyStopping(monitor="dev/spearman", mode="max")` needs an
            evaluation in the first epoch (`trainer.eval_every`); `trainer.patience` stops early without a callback, and exactly
            on resume.
        loggers: Additional Lightning loggers; they get the training and dev metrics and the test scores.
        folder: Run folder, absent or empty; None for outputs/DATE/TIME-MODEL-DATA in the current folder. Rows in memory are
            written to data.jsonl in it, so that config.yaml repeats the run and `python run.py resume=FOLDER` resumes it.

    Returns:
        The model with the tensors of the best step.

    Raises:
        PromcseError: Invalid settings or data. KeyboardInterrupt: Ctrl-C stopped the run; a checkpoint is saved.

    Examples:
        >>> import promcse_pl
        >>> rows = [
        ...     ("A woman is reading.", "Someone reads.", "A woman is running."),
        ...     ("A dog sleeps on a sofa.", "A pet is resting.", "A dog barks at a cat."),
        ...     ("Two men play chess.", "People play a board game.", "Two men play football."),
        ... ]
        >>> model = promcse_pl.train(rows, overrides=["trainer.epochs=2", "tracking=local"])
        >>> embeddings = model.encode(["A girl studies a map."])
    """
    rows = None if isinstance(data, str | Path) else _to_tuples(data)
    kind = TRAINING_ROWS[len(rows[0])].name if rows else _data_group(data)
    is_known_model = model in config_groups()["model"]
    folder = expand(folder or _new_folder(Path(model).name, kind))
    values = {} if is_known_model else {"model.path": str(model)}
    if rows or data not in config_groups()["data"]:
        values["data.train"] = str(folder.absolute() / DATA if rows else data)
    _check_effects(overrides, values)
    typed = {override.partition("=")[0] for override in overrides}
    groups = {"data": kind, "model": str(model) if is_known_model else "minilm"}.items()
    defaults = [f"{group}={choice}" for group, choice in groups if group not in typed]
    config = compose_config([*defaults, *overrides], values)
    if not is_known_model:
        _check_encoder_name(str(model), config.model.revision)
    (*_, choice) = (line.partition("=")[2] for line in [*defaults, *overrides] if line.startswith("model="))
    with _saved_rows(rows or [], folder):
        _run(config, folder, callbacks, loggers, recipe_note(config, choice))
    from promcse_pl.embedder import PromCSE  # late: it imports torch

    return PromCSE.load(folder)


def _check_effects(overrides: Sequence[str], values: Mapping[str, str]) -> None:
    """Check that no override is without effect: settings of Hydra and of sweeps, and those of the arguments of `train`."""
    if isinstance(overrides, str):
        raise ConfigError(f"overrides must be a list, got {overrides[:200]!r}. Try: overrides=[{overrides[:200]!r}]")
    instead = {"data.train": "the argument data", "model.path": "the argument model"}
    for override in overrides:
        key = override.lstrip("+~").partition("=")[0]
        if key in values:
            raise ConfigError(f"{override[:200]} has no effect, since train() sets {key}. Try: {instead[key]}")
        if re.split("[./]", key)[0] in ("hydra", "sweep"):
            raise ConfigError(
                f"{override[:200]} has no effect in train(). Try: the argument folder for the run folder, "
                f"or {run_command('-m')} for a sweep"
            )


def _check_encoder_name(name: str, revision: str | None) -> None:
    """Check that a name that resembles one in conf/model is an encoder, such as t5-base, and no typing error.

    Raises:
        ConfigError: There is no encoder of that name; the message has the nearest names.
    """
    choices = config_groups()["model"]
    near = difflib.get_close_matches(name, choices, n=3)
    if not near or "/" in name or is_folder(expand(name)):
        return
    from promcse_pl.models.hub import locate  # late: it imports torch

    try:
        locate(name, revision, weights=())
    except EncoderError as error:
        meant = " or ".join(f"model={choice!r}" for choice in near)
        raise ConfigError(
            f"model={name!r} is neither a model in conf/model nor an encoder. Did you mean {meant}? Allowed: "
            f"{', '.join(choices)}, a folder, or a hub id"
        ) from error


def _data_group(data: object) -> str:
    """Return the choice of conf/data for a file or the name of a data set."""
    if data in config_groups()["data"]:
        return str(data)
    return "sentences" if file_suffix(Path(str(data))) == ".txt" else "triplets"


def _run(
    config: Config, folder: Path, callbacks: Sequence[Callback], loggers: Sequence[Logger], note: str | None
) -> None:
    ranks = find_ranks(config.trainer)
    if ranks is not None and ranks.size > 1:
        raise ConfigError("promcse_pl.train does not run under torchrun or srun. Try: torchrun ... run.py")
    try:
        run_job(config, folder, callbacks=callbacks, loggers=loggers, note=note)
    except Stopped as stopped:
        if stopped.signum == signal.SIGINT:
            raise KeyboardInterrupt from stopped
        raise


@contextmanager
def _saved_rows(rows: list[tuple[str, ...]], folder: Path) -> Iterator[None]:
    """Write rows to data.jsonl in a new run folder; remove it if the block fails before the run has started."""
    if not rows:
        yield
        return
    check_run_folder(folder)
    is_new, path = not folder.exists(), folder / DATA
    titles = TRAINING_ROWS[len(rows[0])].titles
    lines = [json.dumps(dict(zip(titles, row, strict=True)), ensure_ascii=False) + "\n" for row in rows]
    content = "".join(lines).encode(errors="backslashreplace")
    is_own = not path.exists()
    if not is_own and not (path.is_file() and path.read_bytes() == content):
        raise ConfigError(f"{path} has other rows and is not overwritten. Try: another folder, or data={str(path)!r}")
    write_bytes(path, content)
    try:
        yield
    finally:
        if is_own and not (folder / CONFIG).exists():
            path.unlink()
            if is_new:
                with suppress(OSError):
                    folder.rmdir()


def _to_tuples(rows: Iterable[Row]) -> list[tuple[str, ...]]:
    """Return rows in memory as tuples of 1 to 3 texts, in the order sentence, or anchor, positive, hard negative.

    Raises:
        DataError: There are no rows, they differ in the number of texts, a text is blank, or a key is not known.
    """
    if isinstance(rows, Mapping | bytes) or hasattr(rows, "columns"):  # iterating over them gives no rows
        raise DataError(
            f"data must be a file or an iterable of rows, got {type(rows).__name__}. Try: a list of tuples, or "
            'DATAFRAME.to_dict("records")'
        )
    tuples = [_to_tuple(number, row) for number, row in enumerate(rows)]
    memory_source("data", tuples)  # checks the rows
    return tuples


def _to_tuple(number: int, row: Row) -> tuple[str, ...]:
    if isinstance(row, str):
        return (row,)
    texts = tuple(row.values() if isinstance(row, Mapping) else row) if isinstance(row, Iterable) else ()
    kind = TRAINING_ROWS.get(len(texts))
    if kind is None:
        raise DataError(f"data: row {number} must hold 1, 2 or 3 texts, got {str(row)[:200]}")
    if not isinstance(row, Mapping):
        return texts
    positions = Columns.of(list(row), len(row)).match(kind)
    if positions is None:
        raise DataError(
            f"data: the keys of a row must be {', '.join(kind.titles)}, got {', '.join(row)[:200]} in row {number}"
        )
    return tuple(texts[position] for position in positions)


def _new_folder(model: str, data: str) -> Path:
    """Return a run folder named like those of the command line (hydra.run.dir in conf/config.yaml)."""
    return Path(f"{datetime.now():outputs/%Y-%m-%d/%H-%M-%S}-{model}-{data}")
