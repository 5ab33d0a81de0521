"""The work of a run: encoder and data in, training, evaluation, results. The only place that wires all layers."""

from __future__ import annotations

import dataclasses
import json
import logging
import platform
import time
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from promcse_pl.config import Config
from promcse_pl.data.columns import TRAINING_ROWS
from promcse_pl.run_folder import ADAPTER, BAD_ROWS, CONFIG, HISTORY, RESULTS, Status, write_config
from promcse_pl.training.distributed import (
    Ranks,
    check_equal_on_ranks,
    facts_of_rank,
    gather_values,
    join_process_group,
    leave_process_group,
    rank_zero_first,
)
from promcse_pl.utils.errors import DataError
from promcse_pl.utils.files import write_text
from promcse_pl.utils.imports import without_gc
from promcse_pl.utils.paths import hide_home
from promcse_pl.utils.terminal import config_tree, progress_bar, stages
from promcse_pl.version import __version__

if TYPE_CHECKING:
    from promcse_pl.training.checkpoint import Checkpoint
    from promcse_pl.utils.signals import StopSignals

log = logging.getLogger("promcse_pl")

EXCERPT = 80
"""Maximum number of characters that are logged of each text of the first row."""
TRUNCATED_SHARE = 0.05
"""Fraction of truncated sentences above which a warning is logged."""
MIN_FROZEN_SCORE = 0.05
"""Dev Spearman of the frozen encoder below which a warning is logged."""


def run_experiment(
    config: Config,
    folder: Path,
    console: Console,
    status: Status,
    resume: Checkpoint | None,
    stop: StopSignals,
    ranks: Ranks,
) -> dict[str, Any]:
    """Train and evaluate as one process of a run, and write what it leaves behind.

    Args:
        config: Valid settings.
        folder: Of the run, locked; rank 0 writes into it.
        console: Where to print.
        status: Where the run stands.
        resume: Where an earlier process left it; None: begin.
        stop: The signals, taken in hand.
        ranks: The place of this process.

    Returns:
        What results.json holds on rank 0, {} on the others.
    """
    started = time.perf_counter()
    with console.status("loading torch"), without_gc():  # late: mistakes in a config must not wait for it
        import torch

        from promcse_pl.adapter import save_adapter
        from promcse_pl.evaluation.report import headline, tables
        from promcse_pl.runs.inputs import describe_inputs, record_inputs
        from promcse_pl.tracking.local import JsonlLogger
        from promcse_pl.tracking.wandb import finish_wandb, start_wandb
        from promcse_pl.training.fit import build_data, build_encoder, build_mlm_head, fit, resolve_machine

    join_process_group(ranks, config.trainer)
    check_equal_on_ranks(facts_of_rank(config, resume.step if resume else None))
    folder, own_folder = gather_values(folder)[0], folder
    if folder != own_folder:  # torchrun composes a config in every process, and the clock went on
        with suppress(OSError):
            own_folder.rmdir()
    config, device = resolve_machine(Config.from_dict(hide_home(config.to_dict())))
    if ranks.rank == 0:
        console.print(config_tree(config.to_dict()))
    encoder = build_encoder(config)
    model = dataclasses.replace(config.model, revision=encoder.backbone.identity.revision)
    config = dataclasses.replace(
        config, model=model
    )  # the commit that was read, so that the saved config repeats the run
    mlm_head = build_mlm_head(config, encoder.backbone)
    with rank_zero_first(ranks), progress_bar(console, "tokenising", None) as progress:
        data = build_data(config, encoder, progress)
    _report_rows(data, folder, ranks)
    trained = sum(p.numel() for p in encoder.parameters() if p.requires_grad)
    total = sum(p.numel() for p in encoder.parameters())
    log.info("trained: %s of %s parameters (%.2f %%)", f"{trained:,}", f"{total:,}", 100 * trained / total)
    inputs = describe_inputs(config, encoder, data)
    if ranks.rank == 0:
        record_inputs(folder, inputs)
        write_config(config, folder / CONFIG)  # again: what `auto` left open is settled now
    check_equal_on_ranks({name: inputs[name]["sha256"] for name in ("data.train", "data.dev", "model.path")})
    if resume:
        log.info("resuming after step %d", resume.step)
    elif ranks.rank == 0 and data.dev is not None:
        _score_frozen(config, encoder, data, device, console)

    wandb_run = start_wandb(config, folder, status.wandb_id) if ranks.rank == 0 and status.wandb_id else None
    try:
        fitted = fit(
            config,
            encoder,
            data,
            device=device,
            mlm_head=mlm_head,
            loggers=[JsonlLogger(folder / HISTORY)] if ranks.rank == 0 else [],
            folder=folder,
            console=console,
            status=status,
            stop=stop,
            started=started,
            resume=resume,
            ranks=ranks,
        )
        leave_process_group(ranks)
        if ranks.rank:
            return {}
        summary = {
            "rows": len(data.token_rows),
            "steps": fitted.steps,
            "best_step": fitted.best_step,
            "dev": data.dev.name if data.dev else None,
            "dev_spearman": None if fitted.dev_score is None else round(100 * fitted.dev_score, 4),
            "seed": config.seed,
        }
        save_adapter(encoder.to("cpu"), folder / ADAPTER, training=summary)
        if data.dev or config.evaluation.tasks:
            log.info(
                "evaluating %s", "the adapter and the frozen encoder" if config.evaluation.frozen else "the adapter"
            )
        with stages(console) as report:
            evaluation = _evaluate(config, folder / ADAPTER, data.dev, device.type, report)
    except BaseException:
        if wandb_run:
            wandb_run.finish(exit_code=1)
        raise
    rows = data.token_rows
    results = {
        "scores": headline(evaluation),
        **summary,
        "trained_parameters": trained,
        "trained_share": trained / total,
        "training_seconds": round(fitted.seconds, 2),
        "rows_per_second": round(fitted.rows_per_second, 2),
        "seconds": round(fitted.earlier_seconds + time.perf_counter() - started, 2),
        "tokens": {"cache": rows.fingerprint, "truncated": rows.truncated, "skipped_rows": len(rows.bad_rows)},
        "evaluation": evaluation,
        "versions": {"promcse_pl": __version__, "torch": torch.__version__, "python": platform.python_version()},
        "machine": {"device": device.type, "threads": torch.get_num_threads(), "precision": config.trainer.precision},
    }
    write_text(folder / RESULTS, json.dumps(hide_home(results), indent=2) + "\n")
    for warning in evaluation.get("warnings", ()):
        log.warning("%s", warning)
    for table in tables(evaluation):
        console.print(table)
    if wandb_run:
        finish_wandb(wandb_run, results, folder / ADAPTER)
    log.info("adapter: %s (%.0f s in all)", folder / ADAPTER, results["seconds"])
    return results


def _evaluate(config: Config, adapter: Path, dev: Any, device: str, report: Any) -> dict[str, Any]:  # noqa: ANN401
    """Score the adapter as it lies on disk, beside the frozen encoder if asked, in float32; nothing to score on: {}."""
    from promcse_pl.data.sources import cache_dir, data_dir
    from promcse_pl.embedder import PromCSE
    from promcse_pl.evaluation.suite import evaluate
    from promcse_pl.evaluation.targets import Member, Target, frozen_target
    from promcse_pl.evaluation.tasks import load_tasks, pair_task
    from promcse_pl.evaluation.vectors import VectorCache

    tasks = load_tasks(config.evaluation.tasks, data_dir(config.data))
    if dev is not None:
        tasks.append(pair_task("dev", "dev", [dev]))
    if not tasks:
        return {}
    model = PromCSE.load(adapter, device=device)
    targets = [Target("adapter", "adapter", (Member(lambda: model, config.seed),))]
    if config.evaluation.frozen:
        targets = [frozen_target(model), *targets]
    return evaluate(targets, tasks, VectorCache(cache_dir(config.data.cache_dir) / "vectors"), report)


def _report_rows(data: Any, folder: Path, ranks: Ranks) -> None:  # noqa: ANN401  (PromcseDataModule, imported late)
    rows = data.token_rows
    for note in data.notes:
        log.info("%s", note)
    titles = TRAINING_ROWS[rows.width].titles
    shown = (f"{title} {_excerpt(text)}" for title, text in zip(titles, data.example, strict=True))
    log.info("first row: %s", ", ".join(shown))
    log.info(
        "%s: %s rows, %s tokens (%s)",
        data.config.train,
        f"{len(rows):,}",
        f"{rows.tokens_total:,}",
        "from the cache" if rows.reused else "tokenised now",
    )
    if len(rows) < data.config.batch_size:
        log.info(
            "%d rows are fewer than data.batch_size=%d: each epoch is one step. For about 10 steps per epoch: data.batch_size=%d",
            len(rows),
            data.config.batch_size,
            max(2, len(rows) // 10),
        )
    _report_truncation(data)
    if rows.bad_rows:
        if ranks.rank == 0:
            write_text(folder / BAD_ROWS, "".join(f"{hide_home(str(row))}\n" for row in rows.bad_rows))
        log.warning("%d bad rows were skipped; they are listed in %s", len(rows.bad_rows), folder / BAD_ROWS)
    if data.dev is None:
        log.info("no development set: the last step is kept")
    else:
        log.info("development set: %s, %s pairs", data.dev.name, f"{len(data.dev):,}")


def _excerpt(text: str) -> str:
    """Return the start of a text in quotes, control characters escaped."""
    return repr(text if len(text) <= EXCERPT else f"{text[: EXCERPT - 1]}…")


def _report_truncation(data: Any) -> None:  # noqa: ANN401  (PromcseDataModule)
    rows, length = data.token_rows, data.config.max_length
    share = rows.truncated / (len(rows) * rows.width)
    most = min(data.longest_input, 512)
    if not rows.truncated:
        return
    message = f"{100 * share:.1f} % of the sentences ({rows.truncated:,}) are truncated to {length} tokens"
    if share <= TRUNCATED_SHARE:
        log.info("%s", message)
    elif most > length:
        advised = min(2 * length, most)
        log.warning("%s. To truncate fewer: data.max_length=%d (the maximum here is %d)", message, advised, most)
    else:
        log.warning("%s, the maximum of data.max_length for this encoder", message)


def _score_frozen(config: Config, encoder: Any, data: Any, device: Any, console: Console) -> None:  # noqa: ANN401
    """Log the frozen encoder's dev score, as a warning if it suggests wrong columns or a reversed score scale.

    The embeddings are cached for later runs, and for the final evaluation if it uses the same precision.
    """
    import numpy as np

    from promcse_pl.data.sources import cache_dir
    from promcse_pl.embedder import PromCSE
    from promcse_pl.evaluation.correlation import spearman
    from promcse_pl.evaluation.sts import score_task
    from promcse_pl.evaluation.targets import frozen_target
    from promcse_pl.evaluation.vectors import VectorCache

    modes = [(module, module.training) for module in encoder.modules()]
    model = frozen_target(PromCSE(encoder.to(device), data.tokenizer)).members[0].load()
    sentences = [*data.dev.first, *data.dev.second]
    try:
        with progress_bar(console, "scoring the frozen encoder on the dev set", len(set(sentences))) as progress:
            vectors = VectorCache(cache_dir(config.data.cache_dir) / "vectors").vectors(model, sentences, progress)
        score = score_task([data.dev], vectors).all.spearman
        highest = spearman(np.argsort(np.argsort(data.dev.gold, kind="stable")), data.dev.gold)
    except DataError as error:
        log.warning("the frozen encoder cannot be scored on the dev set: %s", error)
        return
    finally:
        for module, training in modes:
            module.training = training
    if score >= highest - 1e-9:
        log.warning(
            "frozen encoder: dev Spearman %.2f, the highest possible on this dev set: it cannot rank training steps. Set "
            "data.dev=FILE with more or harder pairs",
            100 * score,
        )
        return
    if score >= MIN_FROZEN_SCORE:
        log.info("frozen encoder: dev Spearman %.2f", 100 * score)
        return
    log.warning(
        "frozen encoder: dev Spearman %.2f, but a pre-trained encoder usually scores well above 0. Check the columns of "
        "data.dev=%s and data.train, and that higher scores mean more similar",
        100 * score,
        config.data.dev,
    )
