"""The saved view of a W&B project: training, dev scores, sweeps, final scores, speed. Requires the extra `dashboard`.

`save_view`, `save_and_print` and `sent_json` are also used by the report of a sweep.
"""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from typing import Any

from promcse_pl.run_folder import DEV_METRICS
from promcse_pl.utils.errors import ConfigError
from promcse_pl.utils.interpreter import python_command

SAVE_SECONDS = 60
"""Time limit for saving a view."""
NO_KEY = 3
"""Exit code of the process that saves a view if W&B finds no key."""
VIEW_NAME, DEFAULT_PROJECT = "PromCSE", "promcse"
"""Name of the view, and the default project."""
_COLORS = (("#440154", 0), ("#21918c", 50), ("#fde725", 100))
"""Viridis from the worst to the best score: readable in greyscale and with colour blindness."""
_DEV = {f"{text} x 100": key for key, text in DEV_METRICS.items()}
"""Title of each metric of dev sets, and its name in keys; a run has one of them."""
CURVES = {
    "Training": {
        "loss": "train/loss",
        "contrastive": "train/contrastive",
        "CoSENT": "train/cosent",
        "energy hinge": "train/hinge",
        "masked language model": "train/mlm",
        "gradient norm before clipping": "train/gradient_norm",
        "learning rate": "train/lr",
    },
    "Development": {
        title: metric
        for name, key in _DEV.items()
        for title, metric in ((f"dev {name}", f"dev/{key}"), (f"best dev {name} so far", f"dev/best_{key}"))
    },
    "Speed": {
        "rows/s": "speed/rows_per_second",
        "tokens/s": "speed/tokens_per_second",
        "padding share": "speed/padding_share",
    },
}
"""Line plots by step: section -> title -> metric."""


def build_workspace(entity: str, project: str) -> Any:  # noqa: ANN401  (a wandb_workspaces Workspace)
    """Return the view as an object; nothing is sent.

    W&B has no heat map panel: temperature x margin is a scatter plot coloured by the dev score.

    Args:
        entity: W&B user or team.
        project: W&B project.
    """
    import wandb_workspaces.reports.v2 as panels
    import wandb_workspaces.workspaces as views

    sections = {
        section: [line_plot(title, metric) for title, metric in curves.items()] for section, curves in CURVES.items()
    }
    sections["Sweep"] = [
        *(panel for title, key in _DEV.items() for panel in _sweep_panels(title, f"dev/{key}")),
        panels.WeavePanelSummaryTable(table_name="jobs"),
    ]
    sections["Scores"] = [
        panels.WeavePanelSummaryTable(table_name="results"),
        *(
            panels.BarPlot(title=f"final dev {title}", metrics=[panels.SummaryMetric(f"dev/{key}")])
            for title, key in _DEV.items()
        ),
        panels.BarPlot(title="test average (not to choose by)", metrics=[panels.SummaryMetric("test/avg")]),
    ]
    return views.Workspace(
        entity=entity,
        project=project,
        name=VIEW_NAME,
        sections=[
            views.Section(name=name, panels=sections[name], is_open=True)
            for name in ("Training", "Development", "Sweep", "Scores", "Speed")
        ],
    )


def _sweep_panels(title: str, metric: str) -> list[Any]:
    """Return the panels of the settings of a sweep against a dev metric."""
    import wandb_workspaces.reports.v2 as panels

    dev = panels.SummaryMetric(metric)
    temperature, margin, hinge_weight, length, lr = (
        panels.Config(key)
        for key in ("loss.temperature", "loss.margin", "loss.hinge_weight", "prompt.length", "optim.lr")
    )
    columns = [
        panels.ParallelCoordinatesPlotColumn(metric=column)
        for column in (temperature, margin, hinge_weight, length, lr, dev)
    ]
    return [
        panels.ScatterPlot(
            title=f"temperature x margin, colour: dev {title}", x=temperature, y=margin, z=dev, gradient=score_colors()
        ),
        panels.ScatterPlot(title=f"prompt length, dev {title}", x=length, y=dev, running_ymean=True),
        panels.ParallelCoordinatesPlot(title=f"settings to dev {title}", columns=columns, gradient=score_colors()),
        panels.ParameterImportancePlot(with_respect_to=metric),
    ]


def line_plot(title: str, metric: str) -> Any:  # noqa: ANN401  (a LinePlot)
    """Return the panel of a metric by optimiser step."""
    import wandb_workspaces.reports.v2 as panels

    return panels.LinePlot(title=title, x="step", y=[metric])


def score_colors() -> list[Any]:
    """Return the colours of scores in scatter plots and parallel coordinates."""
    import wandb_workspaces.reports.v2 as panels

    return [panels.GradientPoint(color=color, offset=offset) for color, offset in _COLORS]


def sent_json(view: Any) -> str:  # noqa: ANN401  (a wandb_workspaces Workspace or Report)
    """Return the JSON that `save` of a view sends; the server adds the ids.

    It uses a private method, because wandb-workspaces has no public one.
    """
    sent = json.loads(view._to_model().model_dump_json(by_alias=True, exclude_none=True))
    return json.dumps(sent, indent=2) + "\n"


def save_dashboard(project: str, entity: str | None) -> str:
    """Save the view on the W&B server; return its URL.

    Args:
        project: W&B project.
        entity: W&B user or team; None: the account's default.

    Raises:
        ConfigError: The extra or the key is missing, or the server does not save the view within the time limit.
    """
    return save_view("promcse_pl.tracking.dashboard:main", project, entity)


def require_extra() -> None:
    """Raise ConfigError if wandb-workspaces is not installed."""
    if importlib.util.find_spec("wandb_workspaces") is None:
        raise ConfigError("promcse dashboard needs wandb-workspaces. Try: pip install 'promcse_pl[dashboard]'")


def save_view(target: str, *arguments: str | None) -> str:
    """Save a view in a child process with a time limit, since wandb-workspaces has no timeout; return the URL of the view.

    Args:
        target: "module:function" that takes the arguments as a JSON list and returns `save_and_print(...)`.
        arguments: Arguments of the function.

    Raises:
        ConfigError: The extra or the key is missing, or the server does not save the view within the time limit.
    """
    require_extra()
    command = python_command(target, json.dumps(arguments))
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=SAVE_SECONDS)
    except subprocess.TimeoutExpired:
        raise ConfigError(
            f"the W&B server did not answer in {SAVE_SECONDS} s. Try: again with a network; WANDB_BASE_URL names the server"
        ) from None
    if done.returncode == NO_KEY:
        raise ConfigError("promcse dashboard needs a W&B key. Try: wandb login")
    if done.returncode:
        lines = [
            line for line in done.stderr.splitlines() if line and not line[0].isspace()
        ]  # without indented details
        reason = lines[-1].rstrip(".") if lines else "no reason given"
        raise ConfigError(
            f"W&B did not save the view: {reason}. "
            "Try: wandb login, another --project or --entity, or another server in WANDB_BASE_URL"
        )
    return done.stdout.strip().splitlines()[-1]


def save_and_print(entity: str | None, build: Callable[[str], Any]) -> int:
    """Save a view and print its URL; return 0, or `NO_KEY`.

    Args:
        entity: W&B user or team; None: the account's default.
        build: Returns the Workspace or Report of an entity.
    """
    import wandb

    try:
        api = wandb.Api(timeout=SAVE_SECONDS // 3)
    except wandb.errors.UsageError:
        return NO_KEY
    view = build(entity or api.default_entity)
    view.save()
    sys.stdout.write(f"{view.url}\n")
    return 0


def main(arguments: Sequence[str]) -> int:
    """Save the view of a project and entity (a JSON list as the only argument) and print its URL; return 0 or `NO_KEY`."""
    project, entity = json.loads(arguments[0])
    return save_and_print(entity, lambda entity: build_workspace(entity, project))
