"""Lightning's TensorBoard, CSV and MLflow loggers for `tracking.logger`. Their files are in the run folder."""

from __future__ import annotations

import os
from pathlib import Path

from pytorch_lightning.loggers import CSVLogger, Logger, MLFlowLogger, TensorBoardLogger

from promcse_pl.config import Config, flat_settings
from promcse_pl.run_folder import HISTORY, read_history
from promcse_pl.tracking.wandb import sent_settings
from promcse_pl.utils.files import write_text

_MLFLOW_RUN = "mlflow_run.txt"
"""File with the id of the MLflow run, which a resumed run continues."""


def build_logger(config: Config, folder: Path, step: int) -> Logger | None:
    """Return the logger of `tracking.logger` with the run's settings logged; None for `none`.

    A resumed run continues the files of the earlier process: entries after the checkpoint are dropped, except in MLflow, which
    cannot delete metrics and keeps both values of a step.

    Args:
        config: Settings of the run; of these, the logger gets what W&B would get (`sent_settings`).
        folder: Run folder, whose history ends at `step`.
        step: Step of the checkpoint that the run is resumed from; 0 for a new run.
    """
    # MLflow refuses other values of a setting, and execution settings may change on resume
    has_settings = config.tracking.logger == "mlflow" and (folder / _MLFLOW_RUN).exists()
    match config.tracking.logger:
        case "csv":
            for name in ("metrics.csv", "hparams.yaml"):  # rewritten from the history, without Lightning's warning
                (folder / "csv" / name).unlink(missing_ok=True)
            logger: Logger = CSVLogger(folder, name="csv", version="", flush_logs_every_n_steps=1)
        case "tensorboard":
            purge_step = step + 1 if (folder / "tensorboard").exists() else None
            logger = TensorBoardLogger(
                folder, name="tensorboard", version="", default_hp_metric=False, purge_step=purge_step
            )
        case "mlflow":
            logger = _mlflow_logger(config, folder)
        case "none":
            return None
    if not has_settings:
        logger.log_hyperparams(flat_settings(sent_settings(config)))
    if isinstance(logger, CSVLogger) and (folder / HISTORY).exists():
        for entry in read_history(folder / HISTORY):
            logger.log_metrics({name: value for name, value in entry.items() if name != "step"}, entry["step"])
    return logger


def _mlflow_logger(config: Config, folder: Path) -> MLFlowLogger:
    """Return the logger of a new MLflow run, or of the run that an earlier process has created.

    The run is created here: Lightning and MLflow's own functions would add the user's name and paths of this machine as tags.
    """
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")  # set before mlflow is imported
    from mlflow.tracking import MlflowClient

    uri = os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{(folder / 'mlflow.db').absolute()}"
    is_local = uri.startswith("sqlite:")
    if not (folder / _MLFLOW_RUN).exists():
        client, tracking = MlflowClient(uri), config.tracking
        experiment = client.get_experiment_by_name(tracking.project)
        artifacts = str((folder / "mlartifacts").absolute()) if is_local else None
        experiment_id = (
            experiment.experiment_id
            if experiment
            else client.create_experiment(tracking.project, artifact_location=artifacts)
        )
        run = client.create_run(
            experiment_id, run_name=tracking.name or folder.name, tags=dict.fromkeys(tracking.tags, "true")
        )
        write_text(folder / _MLFLOW_RUN, run.info.run_id)
    run_id = (folder / _MLFLOW_RUN).read_text(encoding="utf-8")
    return MLFlowLogger(config.tracking.project, tracking_uri=uri, run_id=run_id)
