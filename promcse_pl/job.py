"""One run: a valid config and a folder in; adapter, results and logs out. The only place that wires all layers."""

from __future__ import annotations

import dataclasses
import json
import logging
import platform
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import yaml
from rich.console import Console

from promcse_pl.config import Config
from promcse_pl.errors import ConfigError, DataError, EncoderError
from promcse_pl.version import __version__

log = logging.getLogger("promcse_pl")

CONFIG, RESULTS, HISTORY, LOG, BAD_ROWS, ADAPTER = (
    "config.yaml",
    "results.json",
    "metrics.jsonl",
    "run.log",
    "bad_rows.txt",
    "adapter",
)


def read_config(path: Path) -> Config:
    """Read a saved config.yaml.

    Raises:
        ConfigError: The file cannot be read, is not YAML, or does not fit the schema.
    """
    try:
        raw = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"cannot read the config {path}: {error}") from error
    return Config.from_dict(raw)


def write_config(config: Config, path: Path) -> Path:
    """Save a config so that `read_config` gives it back; return the path."""
    text = yaml.safe_dump(config.to_dict(), sort_keys=False, allow_unicode=True)
    _write_text(path, f"# promcse train THIS_FILE --out NEW_FOLDER repeats the run\n{text}")
    return path


def run_job(config: Config, folder: Path, console: Console | None = None) -> dict[str, Any]:
    """Train an adapter, evaluate it, and leave everything in a folder.

    The folder gets config.yaml (alone enough to repeat the run), run.log, metrics.jsonl, adapter/, results.json, bad_rows.txt if
    rows were skipped, and wandb/ unless tracking is off.

    Args:
        config: Valid settings.
        folder: Made if absent; must not hold a run.
        console: Where to print.

    Returns:
        What results.json holds.

    Raises:
        PromcseError: Whatever the user can mend; the message says how.
    """
    console = console or Console()
    started = time.perf_counter()
    if (folder / CONFIG).exists():
        raise ConfigError(f"{folder} already holds a run. Try another folder, or delete this one")
    check_inputs(config)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"cannot make the run's folder {folder}: {error.strerror}") from error
    with _logging_to(folder / LOG, console):
        return _run(config, folder, console, started)


def check_inputs(config: Config) -> None:
    """Look whether the files, folders and modes that a config names are there: in a second, before torch and any model.

    Raises:
        ConfigError, DataError, EncoderError: Something is missing.
    """
    from promcse_pl.data.sources import find_file, senteval_dir
    from promcse_pl.tracking.wandb import resolve_mode

    resolve_mode(config.tracking.wandb)
    path = config.model.path
    if (path.startswith((".", "/", "~")) or path.count("/") > 1) and not Path(path).expanduser().is_dir():
        raise EncoderError(
            f"the encoder folder {path} does not exist (current folder: {Path.cwd()}). Try: model.path=FOLDER"
        )
    if "sts" in config.evaluation.tasks or config.data.dev == "stsb":
        senteval_dir(config.data)
    if config.data.train != "demo":
        find_file(config.data.train, config.data, "data.train")
    if config.data.dev not in ("demo", "stsb", "holdout", None):
        find_file(config.data.dev, config.data, "data.dev")


def _run(config: Config, folder: Path, console: Console, started: float) -> dict[str, Any]:
    from promcse_pl.terminal import config_tree, progress_bar, score_table

    with console.status("loading torch"):
        import pytorch_lightning as pl
        import torch

        from promcse_pl.adapter.files import save_adapter
        from promcse_pl.data.module import PromcseDataModule
        from promcse_pl.embedder import pick_device
        from promcse_pl.evaluation.results import evaluate_all
        from promcse_pl.model.backbone import FrozenBackbone
        from promcse_pl.model.encoder import PromptEncoder
        from promcse_pl.model.mlm import MlmHead
        from promcse_pl.tracking.local import JsonlLogger
        from promcse_pl.tracking.wandb import abandon_wandb, finish_wandb, start_wandb
        from promcse_pl.training.callbacks import BestByDev, ProgressLines, Throughput
        from promcse_pl.training.module import PromcseModule
        from promcse_pl.training.precision import choose_dtype

    device = pick_device(config.trainer.device)
    dtype, why = choose_dtype(config.trainer.precision, device)
    precision: Literal["bfloat16", "float32"] = "bfloat16" if dtype == torch.bfloat16 else "float32"
    config = dataclasses.replace(config, trainer=dataclasses.replace(config.trainer, precision=precision))
    console.print(config_tree(config.to_dict()))
    log.info("device: %s; precision: %s", device.type, why)

    for noisy in ("pytorch_lightning", "lightning_fabric"):
        logging.getLogger(noisy).setLevel(logging.ERROR)  # its hints on devices and paid services; errors stay
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="pytorch_lightning.*|lightning_fabric.*|torch.jit.*")
        pl.seed_everything(config.seed, verbose=False)
        backbone = FrozenBackbone.load(config.model.path, revision=config.model.revision, dtype=dtype)
        encoder = PromptEncoder(
            backbone,
            length=config.prompt.length,
            projection_size=config.prompt.projection_size,
            pooling=config.model.pooling,
            head=config.model.head,
            dropout=config.prompt.dropout,
            position_offset=config.prompt.position_offset,
        )
        if encoder.longest_input < 3:
            raise ConfigError(
                f"prompt.length={config.prompt.length} shifts the positions so far that no sentence fits the encoder. "
                f"Try: prompt.length={max(0, config.prompt.length + encoder.longest_input - 32)}"
            )
        mlm_head = None
        if config.loss.mlm_weight:
            mlm_head = MlmHead(backbone.word_embeddings.float(), layer_norm_eps=backbone.layer_norm_eps)
            if not backbone.fill_mlm_head(mlm_head):
                log.warning("%s brings no MLM head; a fresh one is trained", config.model.path)
        with progress_bar(console, "tokenising", None) as progress:
            data = PromcseDataModule(
                config.data,
                backbone.tokenizer,
                longest_input=encoder.longest_input,
                seed=config.seed,
                mlm=mlm_head is not None,
                progress=progress,
            )
            data.setup()
        rows = data.token_rows
        _report_rows(data, folder)
        trained = sum(p.numel() for p in encoder.parameters() if p.requires_grad)
        total = trained + sum(p.numel() for p in backbone.parameters())
        log.info("trained: %s of %s parameters (%.2f %%)", f"{trained:,}", f"{total:,}", 100 * trained / total)

        write_config(config, folder / CONFIG)
        steps = -(-len(rows) // config.data.batch_size) * config.trainer.epochs
        steps = min(steps, config.trainer.max_steps or steps)
        module = PromcseModule(
            encoder,
            loss=config.loss,
            optim=config.optim,
            total_steps=steps,
            chunk_tokens=config.trainer.chunk_tokens,
            mlm_head=mlm_head,
        )
        wandb_logger = start_wandb(config, folder)
        best = BestByDev(data.dev, backbone.tokenizer, every=config.trainer.eval_every) if data.dev else None
        log_every = min(config.trainer.log_every, steps)  # a short run has an entry too
        throughput = Throughput(log_every, config.trainer.chunk_tokens)
        callbacks: list[pl.Callback] = [throughput, *([best] if best else [])]
        if not console.is_terminal:
            callbacks.append(ProgressLines())
        trainer = pl.Trainer(
            accelerator={"cpu": "cpu", "cuda": "gpu", "mps": "mps"}[device.type],
            devices=1,
            precision="32-true",  # the frozen encoder has its own type; everything trained is float32
            max_steps=steps,
            max_epochs=config.trainer.epochs,
            gradient_clip_val=config.optim.clip_norm,
            logger=[JsonlLogger(folder / HISTORY), *([wandb_logger] if wandb_logger else [])],
            callbacks=callbacks,
            log_every_n_steps=log_every,
            enable_checkpointing=False,
            enable_progress_bar=console.is_terminal,
            enable_model_summary=False,
            use_distributed_sampler=False,
            default_root_dir=folder,
        )
        training_started = time.perf_counter()
        try:
            trainer.fit(module, datamodule=data)
        except BaseException:
            if wandb_logger:
                abandon_wandb(wandb_logger)
            raise
        training_seconds = time.perf_counter() - training_started

    summary = {
        "rows": len(rows),
        "steps": steps,
        "best_step": best.best_step if best else steps,
        "dev": data.dev.name if data.dev else None,
        "dev_spearman": round(100 * best.best_score, 4) if best and best.best_score is not None else None,
        "seed": config.seed,
    }
    save_adapter(encoder.to("cpu"), folder / ADAPTER, training=summary)
    with progress_bar(console, "evaluating", None) as progress:
        scores, data_used = evaluate_all(folder / ADAPTER, config, data.dev, device=device.type, progress=progress)
    results = {
        "scores": scores,
        **summary,
        "trained_parameters": trained,
        "trained_share": trained / total,
        "training_seconds": round(training_seconds, 2),
        "rows_per_second": round(throughput.total_rows / throughput.total_seconds, 2)
        if throughput.total_seconds
        else None,
        "seconds": round(time.perf_counter() - started, 2),
        "tokens": {"cache": rows.fingerprint, "truncated": rows.truncated, "skipped_rows": len(rows.bad_rows)},
        "data": data_used,
        "versions": {"promcse_pl": __version__, "torch": torch.__version__, "python": platform.python_version()},
        "machine": {"device": device.type, "threads": torch.get_num_threads(), "precision": config.trainer.precision},
    }
    _write_text(folder / RESULTS, json.dumps(results, indent=2) + "\n")
    if scores:
        console.print(score_table("Spearman x 100 (higher is better)", scores))
    sync = finish_wandb(wandb_logger, results, folder / ADAPTER) if wandb_logger else None
    if sync:
        log.info("the W&B run is offline. To upload it: wandb login && %s", sync)
    log.info("adapter: %s (%.0f s in all)", folder / ADAPTER, results["seconds"])
    return results


def _report_rows(data: Any, folder: Path) -> None:  # noqa: ANN401  (PromcseDataModule, imported late)
    rows = data.token_rows
    log.info(
        "%s: %s rows, %s tokens (%s)",
        data.config.train,
        f"{len(rows):,}",
        f"{rows.tokens_total:,}",
        "from the cache" if rows.reused else "tokenised now",
    )
    if len(rows) < 2:
        raise DataError(f"{data.config.train} has {len(rows)} rows; a batch needs at least 2")
    if rows.truncated:
        log.info("%s sentences were cut to %d tokens", f"{rows.truncated:,}", data.config.max_length)
    if rows.bad_rows:
        _write_text(folder / BAD_ROWS, "".join(f"{row}\n" for row in rows.bad_rows))
        log.warning("%d bad rows were skipped; they are listed in %s", len(rows.bad_rows), folder / BAD_ROWS)
    if data.dev is None:
        log.info("no development set: the last step is kept")
    else:
        log.info("development set: %s, %d pairs", data.dev.name, len(data.dev))


def _write_text(path: Path, text: str) -> None:
    """Write a file whole or not at all."""
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)


@contextmanager
def _logging_to(path: Path, console: Console) -> Iterator[None]:
    """Send the package's log lines to the terminal and, with times, to a file."""
    from promcse_pl.terminal import ConsoleHandler

    to_file = logging.FileHandler(path, encoding="utf-8")
    to_file.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    to_terminal = ConsoleHandler(console)
    handlers = (to_file, to_terminal)
    level = log.level
    log.setLevel(logging.INFO)
    log.propagate = False
    for handler in handlers:
        log.addHandler(handler)
    try:
        yield
    except BaseException as error:
        to_file.handle(log.makeRecord(log.name, logging.ERROR, "", 0, "%s: %s", (type(error).__name__, error), None))
        raise
    finally:
        for handler in handlers:
            log.removeHandler(handler)
            handler.close()
        log.setLevel(level)
