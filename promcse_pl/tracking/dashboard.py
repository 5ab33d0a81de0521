"""The saved view of a W&B project: training, development, sweeps, scores, speed. Needs the extra `dashboard` to be written."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

from promcse_pl.utils.errors import ConfigError
from promcse_pl.utils.interpreter import python_command

SAVE_SECONDS = 60
"""A server that has not taken the view by then is given up."""
NO_KEY = 3
"""Exit code of the process that saves the view if W&B finds no key."""
NAME = "PromCSE"


def build_workspace(entity: str, project: str) -> Any:  # noqa: ANN401  (a wandb_workspaces Workspace)
    """Return the view as an object; nothing is sent.

    W&B has no panel for a heat map: temperature x margin is a scatter plot coloured by the development score.

    Args:
        entity: W&B user or team.
        project: W&B project.
    """
    import wandb_workspaces.reports.v2 as panels
    import wandb_workspaces.workspaces as views

    def curve(title: str, *keys: str, **more: Any) -> Any:  # noqa: ANN401
        return panels.LinePlot(title=title, x="step", y=list(keys), **more)

    dev = panels.SummaryMetric("dev/spearman")
    temperature, margin, length = (panels.Config(key) for key in ("loss.temperature", "loss.margin", "prompt.length"))
    worst_to_best = [panels.GradientPoint(color=color, offset=place) for color, place in COLORS]
    columns = [
        panels.ParallelCoordinatesPlotColumn(metric=metric)
        for metric in (temperature, margin, panels.Config("loss.hinge_weight"), length, panels.Config("optim.lr"), dev)
    ]
    sections = {
        "Training": [
            curve("loss", "train/loss"),
            curve("contrastive", "train/contrastive"),
            curve("energy hinge", "train/hinge"),
            curve("masked language model", "train/mlm"),
            curve("gradient norm before clipping", "train/gradient_norm"),
            curve("learning rate", "train/lr"),
        ],
        "Development": [
            curve("Spearman x 100", "dev/spearman", title_y="Spearman x 100"),
            curve("best so far", "dev/best_spearman", title_y="Spearman x 100"),
        ],
        "Sweep": [
            panels.ScatterPlot(
                title="temperature x margin, colour: dev Spearman",
                x=temperature,
                y=margin,
                z=dev,
                gradient=worst_to_best,
            ),
            panels.ScatterPlot(title="prompt length", x=length, y=dev, running_ymean=True),
            panels.ParallelCoordinatesPlot(title="settings to dev Spearman", columns=columns, gradient=worst_to_best),
            panels.ParameterImportancePlot(with_respect_to="dev/spearman"),
            panels.WeavePanelSummaryTable(table_name="jobs"),
        ],
        "Scores": [
            panels.WeavePanelSummaryTable(table_name="results"),
            panels.BarPlot(title="final dev Spearman x 100", metrics=[dev]),
            panels.BarPlot(title="test average (not to choose by)", metrics=[panels.SummaryMetric("test/avg")]),
        ],
        "Speed": [
            curve("rows/s", "speed/rows_per_second"),
            curve("tokens/s", "speed/tokens_per_second"),
            curve("padding share", "speed/padding_share"),
        ],
    }
    return views.Workspace(
        entity=entity,
        project=project,
        name=NAME,
        sections=[views.Section(name=name, panels=found, is_open=True) for name, found in sections.items()],
    )


COLORS = (("#440154", 0), ("#21918c", 50), ("#fde725", 100))
"""Worst to best: viridis, which is read in grey and by the colour-blind too."""


def save_dashboard(project: str, entity: str | None) -> str:
    """Write the view to the W&B server; return its address.

    Args:
        project: W&B project.
        entity: W&B user or team; None: the account's default.

    Raises:
        ConfigError: The extra or the key is missing, or the server does not take the view in time.
    """
    if importlib.util.find_spec("wandb_workspaces") is None:
        raise ConfigError("promcse dashboard needs wandb-workspaces. Try: pip install 'promcse_pl[dashboard]'")
    command = python_command("promcse_pl.tracking.dashboard:main", json.dumps([project, entity]))
    try:  # a process of its own: wandb has no time limit for this
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=SAVE_SECONDS)
    except subprocess.TimeoutExpired:
        raise ConfigError(
            f"the W&B server did not answer in {SAVE_SECONDS} s. Try: again with a network; WANDB_BASE_URL names the server"
        ) from None
    if done.returncode == NO_KEY:
        raise ConfigError("promcse dashboard needs a W&B key. Try: wandb login")
    if done.returncode:
        reason = done.stderr.strip().splitlines()[-1:] or ["no reason given"]
        raise ConfigError(f"W&B did not take the view: {reason[0]}. Try: wandb login, or another --project, --entity")
    return done.stdout.strip().splitlines()[-1]


def main(arguments: Sequence[str]) -> int:
    """Save the view of a project and entity (a JSON list as the only argument) and print its URL; return 0 or `NO_KEY`."""
    import wandb

    project, entity = json.loads(arguments[0])
    try:
        api = wandb.Api(timeout=SAVE_SECONDS // 3)
    except wandb.errors.UsageError:
        return NO_KEY
    workspace = build_workspace(entity or api.default_entity, project)
    workspace.save()
    sys.stdout.write(f"{workspace.url}\n")
    return 0
