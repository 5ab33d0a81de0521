"""Weights & Biases: a run that never costs the training anything.

Only an allow-list goes out: the typed config, logged numbers, the final table and the adapter. Console output, the
environment, the git state and the machine's description stay here.
"""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from promcse_pl.config import Config
from promcse_pl.errors import ConfigError

if TYPE_CHECKING:
    from pytorch_lightning.loggers import WandbLogger

log = logging.getLogger("promcse_pl")

MODES = ("online", "offline", "disabled")


def resolve_mode(setting: str) -> str:
    """Return the mode of a run: WANDB_MODE if set, else the setting; `auto` is online with a key and offline without.

    Raises:
        ConfigError: WANDB_MODE holds something else.
    """
    from_environment = os.environ.get("WANDB_MODE")
    if from_environment:
        mode = {"dryrun": "offline", "run": "online"}.get(from_environment, from_environment)
        if mode not in MODES:
            raise ConfigError(
                f"WANDB_MODE must be one of {', '.join(MODES)}, got {from_environment!r}. Try: unset WANDB_MODE"
            )
        return mode
    if setting != "auto":
        return setting
    return "online" if _has_key() else "offline"


def _has_key() -> bool:
    import wandb

    if os.environ.get("WANDB_API_KEY"):
        return True
    try:
        return bool(wandb.api.api_key)
    except Exception:  # whatever the lookup of a key does, no key is the answer
        return False


def start_wandb(config: Config, folder: Path) -> WandbLogger | None:
    """Start the W&B run of a job; None when disabled, or when W&B cannot be started (a warning says why).

    Args:
        config: The resolved config; it is logged whole.
        folder: The run's folder; W&B's own files go to folder/wandb.
    """
    mode = resolve_mode(config.tracking.wandb)
    if mode == "disabled":
        return None
    os.environ.setdefault("WANDB_SILENT", "true")
    import wandb

    tracking = config.tracking
    settings = wandb.Settings(
        mode=mode,
        console="off",
        silent=True,
        disable_git=True,
        disable_code=True,
        x_disable_meta=True,
        x_disable_machine_info=True,
        init_timeout=30,
    )
    try:
        run = wandb.init(
            project=tracking.project,
            entity=tracking.entity,
            group=tracking.group,
            name=tracking.name or folder.name,
            tags=tracking.tags,
            dir=folder,
            config=config.to_dict(),
            settings=settings,
        )
    except Exception as error:
        # a tracker is never worth a run: keys, networks, disks and versions fail in their own ways
        log.warning("W&B did not start (%s: %s); the run goes on with metrics.jsonl alone", type(error).__name__, error)
        return None
    from pytorch_lightning.loggers import WandbLogger

    if mode == "online":
        log.info("W&B run: %s", run.url)
    return WandbLogger(experiment=run, log_model=False)


def finish_wandb(logger: WandbLogger, results: dict[str, Any], adapter: Path) -> str | None:
    """Put the final scores and the adapter into the run and close it.

    Returns:
        The command that syncs an offline run; None for an online one, or when W&B fails (a warning says how).
    """
    import wandb

    try:
        run = logger.experiment
        scores = results["scores"]
        columns = ["model", *next(iter(scores.values()))]
        table = wandb.Table(columns=columns, data=[[name, *row.values()] for name, row in scores.items()])
        run.log({"results": table})
        run.summary.update({f"test/{task}": value for task, value in scores["adapter"].items()})
        run.summary.update({key: results[key] for key in ("best_step", "trained_parameters", "training_seconds")})
        directory = Path(run.dir).parent
        if not run.offline:
            artifact = wandb.Artifact(f"adapter-{run.id}", type="adapter")
            artifact.add_dir(str(adapter))
            run.log_artifact(artifact)
        run.finish()
    except Exception as error:
        log.warning("W&B did not finish (%s: %s); the run's folder is complete without it", type(error).__name__, error)
        return None
    return f"wandb sync {directory}" if run.offline else None
