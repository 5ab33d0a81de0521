"""Weights & Biases: a run that never costs the training anything.

Only an allow-list goes out: the typed config, logged numbers, the final table and the adapter. Console output, the
environment, the git state and the machine's description stay here.
"""

from __future__ import annotations

import logging
import os
from configparser import ConfigParser
from configparser import Error as ParsingError
from contextlib import suppress
from netrc import NetrcParseError, netrc
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from promcse_pl.config import Config
from promcse_pl.errors import ConfigError
from promcse_pl.paths import hide_home

if TYPE_CHECKING:
    from pytorch_lightning.loggers import WandbLogger

log = logging.getLogger("promcse_pl")

MODES = ("online", "offline", "disabled")
PUBLIC_HOSTS = ("api.wandb.ai", "api.forge.coreweave.com")
"""The public server's names: of always, and of wandb since 0.31."""


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
    """Whether W&B will find a key: in the environment, or in the netrc file that `wandb login` writes."""
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    names = [os.environ["NETRC"]] if os.environ.get("NETRC") else ["~/.netrc", "~/_netrc"]
    for path in (Path(name).expanduser() for name in names):
        with suppress(OSError, NetrcParseError):
            return bool(_hosts() & set(netrc(path).hosts))
    return False


def _hosts() -> set[str]:
    """Return the servers a key may be for: the one that the environment or `wandb login --host` names, or the public ones."""
    settings = ConfigParser(interpolation=None)
    with suppress(OSError, ParsingError, UnicodeDecodeError):
        settings.read(Path(os.environ.get("WANDB_CONFIG_DIR", "~/.config/wandb")).expanduser() / "settings")
    url = os.environ.get("WANDB_BASE_URL") or settings.get("default", "base_url", fallback="")
    return {urlsplit(url).netloc} if url else set(PUBLIC_HOSTS)


def start_wandb(config: Config, folder: Path) -> WandbLogger | None:
    """Start the W&B run of a job; None when disabled, or when W&B cannot be started at all (a warning says why).

    A server that does not answer in 30 s makes the run an offline one.

    Args:
        config: The resolved config; it is logged whole.
        folder: The run's folder; W&B's own files go to folder/wandb.
    """
    mode = resolve_mode(config.tracking.wandb)
    os.environ.setdefault("WANDB_SILENT", "true")
    for attempt in {"online": ("online", "offline"), "offline": ("offline",), "disabled": ()}[mode]:
        try:
            run = _init(config, folder, attempt)
        except Exception as error:
            # a tracker is never worth a run: keys, networks, disks and versions fail in their own ways
            reason = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
            log.warning("W&B did not start %s (%s)", attempt, reason)
            continue
        from pytorch_lightning.loggers import WandbLogger

        if attempt == "online":
            log.info("W&B run: %s", run.url)
        return WandbLogger(experiment=run, log_model=False)
    return None


def _init(config: Config, folder: Path, mode: str) -> Any:  # noqa: ANN401  (a W&B run)
    import wandb

    return wandb.init(
        project=config.tracking.project,
        entity=config.tracking.entity,
        group=config.tracking.group,
        name=config.tracking.name or folder.name,
        tags=config.tracking.tags,
        dir=folder,
        config=config.to_dict(),
        settings=wandb.Settings(
            mode=mode,
            console="off",
            silent=True,
            disable_git=True,
            disable_code=True,
            x_disable_meta=True,
            x_disable_machine_info=True,
            x_disable_stats=True,
            x_save_requirements=False,
            host="-",
            init_timeout=30,
        ),
    )


def _hide_home_in_logs(run: Any) -> None:  # noqa: ANN401  (a W&B run)
    """Take the home folder out of what W&B's client wrote about itself; W&B has no setting for it."""
    for path in Path(run.dir).parent.parent.glob("*/logs/*.log"):
        path.write_text(hide_home(path.read_text(encoding="utf-8", errors="replace")), encoding="utf-8")


def abandon_wandb(logger: WandbLogger) -> None:
    """Close the run of a job that failed, as failed: the next run of this process does not continue it."""
    try:
        logger.experiment.finish(exit_code=1)
        _hide_home_in_logs(logger.experiment)
    except Exception as error:
        log.warning("W&B did not finish (%s: %s)", type(error).__name__, error)


def finish_wandb(logger: WandbLogger, results: dict[str, Any], adapter: Path) -> str | None:
    """Put the final scores and the adapter into the run and close it.

    Returns:
        The command that syncs an offline run; None for an online one, or when W&B fails (a warning says how).
    """
    import wandb

    try:
        run = logger.experiment
        scores = results["scores"]
        if scores:  # empty without a development set and without tasks
            columns = ["model", *scores["adapter"]]
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
        _hide_home_in_logs(run)
    except Exception as error:
        log.warning("W&B did not finish (%s: %s); the run's folder is complete without it", type(error).__name__, error)
        return None
    return f"wandb sync {directory}" if run.offline else None
