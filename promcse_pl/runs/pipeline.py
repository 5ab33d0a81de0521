"""The pipeline of a run: prepare encoder and data, train, evaluate, record. Imports torch."""

from __future__ import annotations

import dataclasses
import json
import logging
import platform
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.loggers import Logger

from promcse_pl.adapter import save_adapter
from promcse_pl.config import Config, decides, flat_settings
from promcse_pl.data.columns import ROW_KINDS
from promcse_pl.data.module import PromcseDataModule
from promcse_pl.data.pairs import ScoredPairs
from promcse_pl.data.retrieval import RetrievalSet
from promcse_pl.data.sources import cache_dir, data_dir, find_contaminated_tasks
from promcse_pl.embedder import PromCSE
from promcse_pl.evaluation import suite
from promcse_pl.evaluation.dev import dev_score, dev_texts, highest_score
from promcse_pl.evaluation.embeddings import EmbeddingCache
from promcse_pl.evaluation.report import condensed, headline, tables
from promcse_pl.evaluation.sts import score_warning
from promcse_pl.evaluation.targets import Member, Target, frozen_target
from promcse_pl.evaluation.tasks import dev_task, load_tasks
from promcse_pl.models.encoder import eval_mode
from promcse_pl.run_folder import ADAPTER, BAD_ROWS, CONFIG, DEV_METRICS, HISTORY, RESULTS, write_config
from promcse_pl.runs.inputs import describe_inputs, ignores_pipeline, record_inputs
from promcse_pl.tracking.lightning import build_logger
from promcse_pl.tracking.local import JsonlLogger
from promcse_pl.tracking.wandb import WandbRun, finish_wandb, score_key, start_wandb
from promcse_pl.training.context import RunContext
from promcse_pl.training.distributed import (
    check_equal_on_ranks,
    facts_of_rank,
    gather_values,
    join_process_group,
    leave_process_group,
    rank_zero_first,
)
from promcse_pl.training.encoder_settings import describe_origins, resolved_model
from promcse_pl.training.fit import Fitted, Parts, build_data, build_encoder, build_mlm_head, fit
from promcse_pl.training.machine import resolve_chunk_tokens, resolve_machine
from promcse_pl.utils.errors import DataError
from promcse_pl.utils.files import write_text
from promcse_pl.utils.paths import hide_home
from promcse_pl.utils.terminal import config_tree, progress_bar, stages
from promcse_pl.version import __version__

log = logging.getLogger("promcse_pl")

EXCERPT_LENGTH = 80
"""Maximum number of characters that are logged of each text of the first row."""
_PATHS = ("data.train", "data.dev", "data.dir")
TRUNCATED_SHARE = 0.05
"""Fraction of truncated sentences above which a warning is logged."""


def run_pipeline(run: RunContext) -> dict[str, Any]:
    """Prepare, train, evaluate and record a run, as one of its ranks.

    Returns:
        The content of results.json on rank 0; an empty dictionary on other ranks.
    """
    run = _join_ranks(run)
    run, parts = _prepare(run)
    _record_inputs(run, parts)
    if run.checkpoint:
        log.info("resuming after step %d", run.checkpoint.step)
    elif run.is_main and parts.data.dev is not None:
        _score_frozen(run, parts)
    with _wandb(run) as wandb_run:
        loggers = _loggers(run)
        fitted = fit(run, parts, loggers)
        leave_process_group(run.ranks)
        if not run.is_main:
            return {}
        summary = _summarize(run.config, parts.data, fitted)
        encoder, training = parts.encoder.to("cpu"), {**summary, **_describe_training(run.config, parts.data)}
        save_adapter(encoder, run.folder / ADAPTER, training=training)
        evaluation = _evaluate(run, parts)
        if evaluation:  # for the model card
            save_adapter(encoder, run.folder / ADAPTER, training={**training, "evaluation": condensed(evaluation)})
    results = _collect_results(run, parts, fitted, summary, evaluation)
    _record(run, results, wandb_run, loggers)
    return results


# --- prepare ----------------------------------------------------------------------------------------------------------


def _join_ranks(run: RunContext) -> RunContext:
    """Join the other ranks, check that all have the same settings and code, and use the folder of rank 0.

    Under torchrun, each process composes its own config, with its own time in the name of the folder.
    """
    join_process_group(run.ranks, run.config.trainer)
    check_equal_on_ranks(facts_of_rank(run.config, run.checkpoint.step if run.checkpoint else None))
    folder = gather_values(run.folder)[0]
    if folder != run.folder:
        with suppress(OSError):
            run.folder.rmdir()
    return dataclasses.replace(run, folder=folder)


def _prepare(run: RunContext) -> tuple[RunContext, Parts]:
    """Resolve the config on this machine, load the encoder and tokenise the data."""
    config, device = resolve_machine(Config.from_dict(hide_home(run.config.to_dict())))
    pl.seed_everything(config.seed, verbose=False)
    if run.is_main:
        run.console.print(config_tree(config.to_dict()))
    encoder = build_encoder(config, with_pipeline=not ignores_pipeline(run.folder))
    for line in describe_origins(run.typed.model, encoder):
        log.info("%s", line)
    resolved = dataclasses.replace(config, model=resolved_model(config.model, encoder))
    # validates the values from the encoder's files, which are read from config.yaml on resume
    config = Config.from_dict(resolved.to_dict())
    mlm_head = build_mlm_head(config, encoder.backbone)
    with rank_zero_first(run.ranks), progress_bar(run.console, "tokenising", None) as progress:
        data = build_data(config, encoder, progress)
    config = resolve_chunk_tokens(config, encoder, data.token_rows, device)
    run, parts = dataclasses.replace(run, config=config), Parts(device, encoder, mlm_head, data)
    _report_data(run, data, encoder.text.max_length)
    trained, total = _count_parameters(parts)
    log.info("trained: %s of %s parameters (%.2f %%)", f"{trained:,}", f"{total:,}", 100 * trained / total)
    if config.tuning.weights == "full":
        size = sum(weight.nbytes for weight in encoder.backbone.parameters())
        log.info("the adapter contains the whole encoder (%.0f MB)", size / 1e6)
    return run, parts


def _record_inputs(run: RunContext, parts: Parts) -> None:
    """Record the inputs of a new run or compare them with those of a resumed one; check that all ranks have the same."""
    inputs = describe_inputs(run.config, parts.encoder, parts.data)
    if run.is_main:
        record_inputs(run.folder, inputs)
        write_config(run.typed, run.folder / CONFIG, run.config)
    check_equal_on_ranks({name: inputs[name]["sha256"] for name in ("data.train", "data.dev", "model.path")})


def _count_parameters(parts: Parts) -> tuple[int, int]:
    """Return the number of trained and of all parameters of the encoder."""
    sizes = [(parameter.numel(), parameter.requires_grad) for parameter in parts.encoder.parameters()]
    return sum(size for size, trained in sizes if trained), sum(size for size, _ in sizes)


def _report_data(run: RunContext, data: PromcseDataModule, max_length: int | None) -> None:
    """Log how the training file is read, the first row, the size of the data and the dev set; list skipped rows.

    Args:
        run: The run.
        data: Its data.
        max_length: Maximum number of tokens of the encoder's text settings.
    """
    rows = data.token_rows
    for note in data.notes:
        log.info("%s", note)
    titles = ROW_KINDS[data.config.kind].titles
    texts = (f"{title} {_excerpt(text)}" for title, text in zip(titles, data.example, strict=True))
    log.info("first row: %s", ", ".join(texts))
    origin = "from the cache" if rows.reused else "tokenised now"
    log.info("%s: %s rows, %s tokens (%s)", data.config.train, f"{len(rows):,}", f"{rows.tokens_total:,}", origin)
    if len(rows) < data.config.batch_size:
        log.info(
            "%d rows are fewer than data.batch_size=%d: each epoch is one step. For about 10 steps per epoch: data.batch_size=%d",
            len(rows),
            data.config.batch_size,
            max(2, len(rows) // 10),
        )
    _report_truncation(data, max_length)
    if rows.bad_rows:
        if run.is_main:
            write_text(run.folder / BAD_ROWS, "".join(f"{hide_home(str(row))}\n" for row in rows.bad_rows))
        log.warning("%d bad rows were skipped; they are listed in %s", len(rows.bad_rows), run.folder / BAD_ROWS)
    if data.dev is None:
        log.info("no dev set: the last step is kept")
    else:
        log.info("dev set: %s, %s", data.dev.name, data.dev.size)
        if isinstance(data.dev, RetrievalSet) and data.dev.name.endswith(" test"):
            log.warning("the best step is selected on the split test: its score does not measure generalisation")
    if run.is_main and (shares := find_contaminated_tasks(run.config.data, run.config.evaluation.tasks)):
        log.warning(
            "%s contains %s: their scores do not measure generalisation. Remove these pairs, or the tasks from evaluation.tasks",
            data.config.train,
            ", ".join(f"{100 * share:.0f} % of the test pairs of {task}" for task, share in shares.items()),
        )


def _excerpt(text: str | float) -> str:
    """Return the start of a text in quotes, control characters escaped; or a score."""
    if not isinstance(text, str):
        return f"{text:g}"
    return repr(text if len(text) <= EXCERPT_LENGTH else f"{text[: EXCERPT_LENGTH - 1]}…")


def _report_truncation(data: PromcseDataModule, max_length: int | None) -> None:
    """Log how many sentences are truncated, as a warning above `TRUNCATED_SHARE`."""
    rows, length = data.token_rows, data.config.max_length
    if not rows.truncated:
        return
    share = rows.truncated / (len(rows) * rows.width)
    longest = min(data.longest_input, 512, max_length or 512)
    message = f"{100 * share:.1f} % of the sentences ({rows.truncated:,}) are truncated to {length} tokens"
    if share <= TRUNCATED_SHARE:
        log.info("%s", message)
    elif longest > length:
        advised = min(2 * length, longest)
        log.warning("%s. To truncate fewer: data.max_length=%d (the maximum here is %d)", message, advised, longest)
    elif max_length == length:
        log.warning("%s, the value of model.max_length", message)
    else:
        log.warning("%s, the maximum of data.max_length for this encoder", message)


def _score_frozen(run: RunContext, parts: Parts) -> None:
    """Log the frozen encoder's dev score, as a warning if it suggests wrong columns or a reversed score scale.

    The embeddings are cached for later runs, and for the final evaluation if it uses the same precision. Random generators and
    the mode of the encoder are not changed.
    """
    data, encoder = parts.data, parts.encoder
    dev = data.dev
    assert dev is not None
    texts, title = dev_texts(dev), "scoring the frozen encoder on the dev set"
    try:
        with eval_mode(encoder), progress_bar(run.console, title, len(set(texts))) as progress:
            model = frozen_target(PromCSE(encoder.to(parts.device), data.tokenizer)).members[0].load()
            cache = EmbeddingCache(cache_dir(run.config.data.cache_dir) / "vectors")
            score = dev_score(dev, cache.embeddings(model, texts, progress))
        highest = highest_score(dev)
    except DataError as error:
        log.warning("the frozen encoder cannot be scored on the dev set: %s", error)
        return
    name = DEV_METRICS[dev.metric]
    if score >= highest - 1e-9:
        log.warning(
            "frozen encoder: dev %s %.2f, the highest possible on this dev set: it cannot rank training steps. Set "
            "data.dev=FILE with more or harder %s",
            name,
            100 * score,
            "pairs" if isinstance(dev, ScoredPairs) else "queries and more documents",
        )
    elif isinstance(dev, ScoredPairs) and (
        warning := score_warning(score, f"data.dev={run.config.data.dev} and data.train")
    ):
        log.warning("frozen encoder: dev %s", warning)
    else:
        log.info("frozen encoder (pooling %s): dev %s %.2f", model.encoder.pooling, name, 100 * score)


# --- track, evaluate, record ------------------------------------------------------------------------------------------


@contextmanager
def _wandb(run: RunContext) -> Iterator[WandbRun | None]:
    """Open the W&B run, and mark it as failed if the block raises; None if W&B is disabled."""
    wandb_run = (
        start_wandb(run.config, run.folder, run.status.wandb_id) if run.is_main and run.status.wandb_id else None
    )
    try:
        yield wandb_run
    except BaseException:
        if wandb_run:
            wandb_run.finish(exit_code=1)
        raise


def _loggers(run: RunContext) -> list[Logger]:
    """Return the Lightning loggers of rank 0: the history, that of `tracking.logger` and those given in Python."""
    if not run.is_main:
        return []
    logger = build_logger(run.config, run.folder, run.checkpoint.step if run.checkpoint else 0)
    return [JsonlLogger(run.folder / HISTORY), *([logger] if logger else []), *run.loggers]


def _evaluate(run: RunContext, parts: Parts) -> dict[str, Any]:
    """Evaluate the saved adapter, and the frozen encoder if configured, in float32; return {} if there is no task."""
    config, adapter = run.config, run.folder / ADAPTER
    tasks = load_tasks(config.evaluation.tasks, data_dir(config.data))
    if parts.data.dev is not None:
        tasks.append(dev_task(parts.data.dev))
    if not tasks:
        return {}
    log.info("evaluating %s", "the adapter and the frozen encoder" if config.evaluation.frozen else "the adapter")
    with stages(run.console) as report:
        model = PromCSE.load(adapter, device=parts.device.type)
        targets = [Target("adapter", "adapter", (Member(lambda: model, config.seed),))]
        if config.evaluation.frozen:
            targets = [frozen_target(model), *targets]
        return suite.evaluate(targets, tasks, EmbeddingCache(cache_dir(config.data.cache_dir) / "vectors"), report)


def _summarize(config: Config, data: PromcseDataModule, fitted: Fitted) -> dict[str, Any]:
    """Return the description of the training that is saved in results.json and in the adapter."""
    return {
        "rows": len(data.token_rows),
        "steps": fitted.steps,
        "stopped_early": fitted.stopped_early,
        "best_step": fitted.best_step,
        "dev": data.dev.name if data.dev else None,
        f"dev_{data.dev.metric if data.dev else 'spearman'}": None
        if fitted.dev_score is None
        else round(100 * fitted.dev_score, 4),
        "seed": config.seed,
    }


def _describe_training(config: Config, data: PromcseDataModule) -> dict[str, Any]:
    """Return the training data and the settings for the adapter and its model card; paths are left out."""
    sections = ("data", "loss", "prompt", "tuning", "optim", "trainer")
    settings = {
        key: value
        for key, value in flat_settings(config.to_dict()).items()
        if key.startswith(sections) and decides(key) == "training" and key not in _PATHS and value is not None
    }
    return {"data": {"name": Path(config.data.train).name, "sha256": data.sha256}, "settings": settings}


def _collect_results(
    run: RunContext, parts: Parts, fitted: Fitted, summary: dict[str, Any], evaluation: dict[str, Any]
) -> dict[str, Any]:
    """Return the content of results.json."""
    trained, total = _count_parameters(parts)
    rows = parts.data.token_rows
    return {
        "scores": headline(evaluation),
        **summary,
        "trained_parameters": trained,
        "trained_share": trained / total,
        "training_seconds": round(fitted.seconds, 2),
        "rows_per_second": round(fitted.rows_per_second, 2),
        "seconds": round(fitted.earlier_seconds + time.perf_counter() - run.started, 2),
        "tokens": {"cache": rows.fingerprint, "truncated": rows.truncated, "skipped_rows": len(rows.bad_rows)},
        "evaluation": evaluation,
        "versions": {"promcse_pl": __version__, "torch": torch.__version__, "python": platform.python_version()},
        "machine": {
            "device": parts.device.type,
            "threads": torch.get_num_threads(),
            "precision": run.config.trainer.precision,
        },
    }


def _record(run: RunContext, results: dict[str, Any], wandb_run: WandbRun | None, loggers: Sequence[Logger]) -> None:
    """Write results.json, print the score tables, log the test scores and finish the W&B run."""
    write_text(run.folder / RESULTS, json.dumps(hide_home(results), indent=2) + "\n")
    for warning in results["evaluation"].get("warnings", ()):
        log.warning("%s", warning)
    for table in tables(results["evaluation"]):
        run.console.print(table)
    scores = {score_key(task): score for task, score in results["scores"].get("adapter", {}).items() if task != "dev"}
    for logger in loggers[1:] if scores else ():  # the first logger is the history: no test scores
        logger.log_metrics(scores, results["steps"])
        logger.finalize("success")
    if wandb_run:
        finish_wandb(wandb_run, results, run.folder / ADAPTER)
    log.info("adapter: %s (%.0f s in total)", run.folder / ADAPTER, results["seconds"])
