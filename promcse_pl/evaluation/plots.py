"""Figures of an evaluation, drawn from its results alone, as wide as a paper's column or page."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from promcse_pl.utils.errors import ConfigError
from promcse_pl.utils.files import atomic_file, find_obstacle
from promcse_pl.utils.paths import expand

COLORS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00")
"""Okabe and Ito (2008): distinguishable with every kind of colour blindness."""
COLUMN, PAGE = 3.3, 6.9
"""Widths in inches."""
FORMATS = (".pdf", ".png", ".svg")
STYLE = {
    "font.size": 8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "grid.linewidth": 0.4,
    "legend.frameon": False,
    "svg.fonttype": "none",
    "pdf.fonttype": 42,
}


def check_plot(path: str | Path) -> None:
    """Check that a figure can be drawn and written, before anything is computed.

    Raises:
        ConfigError: Its suffix is not supported, the folder is not writable, or matplotlib is not installed.
    """
    path = expand(path)
    if path.suffix not in FORMATS:
        raise ConfigError(f"a plot must end in {', '.join(FORMATS)}, got {path}")
    if obstacle := find_obstacle(path.parent):
        raise ConfigError(f"no plot can be written to {path}: {obstacle} is not a writable folder")
    try:
        import matplotlib as mpl
    except ImportError:
        raise ConfigError("plots need matplotlib. Try: pip install 'promcse_pl[plots]'") from None
    mpl.use("agg")


def draw(tree: dict[str, Any], path: str | Path) -> list[Path]:
    """Write a bar chart of all scores, and one of the cosine densities if the geometry was measured.

    Args:
        tree: Result of `promcse_pl.evaluation.suite.evaluate`.
        path: File of the bar chart; the densities get `-density` before the suffix.

    Returns:
        The files.
    """
    path = expand(path)
    import matplotlib.pyplot as plt

    written = []
    with plt.rc_context(STYLE):  # type: ignore[arg-type]
        for name, figure in (("", _bars(tree)), ("-density", _densities(tree))):
            if figure is not None:
                written.append(path.with_name(f"{path.stem}{name}{path.suffix}"))
                try:
                    with atomic_file(written[-1]) as temporary:
                        figure.savefig(temporary, dpi=300, bbox_inches="tight")
                finally:
                    plt.close(figure)
    return written


def _bars(tree: dict[str, Any]) -> Any:  # noqa: ANN401  (a figure)
    import matplotlib.pyplot as plt

    names = [*tree["targets"]]
    tasks = [task for task in tree["targets"][names[0]]["scores"] if tree["tasks"][task]["suite"] != "geometry"]
    if not tasks:
        return None
    width = 0.8 / len(names)
    bars = len(tasks) * len(names)
    figure, axes = plt.subplots(figsize=(COLUMN if bars <= 20 else PAGE, 2.1), layout="constrained")
    lowest, highest = 100.0, 0.0
    for number, name in enumerate(names):
        scores = [tree["targets"][name]["scores"][task] for task in tasks]
        values = np.array([score["value"] for score in scores])
        edges = np.array(
            [[score["value"] if score[end] is None else score[end] for score in scores] for end in ("low", "high")]
        )
        lowest, highest = min(lowest, float(edges.min())), max(highest, float(edges.max()))
        axes.bar(
            np.arange(len(tasks)) + (number - (len(names) - 1) / 2) * width,
            values,
            width,
            yerr=np.abs(edges - values),
            label=name,
            color=COLORS[number % len(COLORS)],
            edgecolor="white",
            linewidth=0.4,
            error_kw={"elinewidth": 0.7, "capsize": 1.2, "capthick": 0.7, "ecolor": "#333333"},
        )
    axes.set_xticks(np.arange(len(tasks)), tasks, rotation=45, ha="right", rotation_mode="anchor")
    axes.tick_params(axis="x", length=0)
    bottom = max(0, 10 * int((lowest - 5) // 10))
    axes.set_ylim(bottom, min(100, 10 * int(highest // 10 + 1)))
    units = " / ".join(sorted({tree["tasks"][task]["unit"].removesuffix(" x 100") for task in tasks}))
    axes.set_ylabel(f"{units}\nx 100" + (f", axis from {bottom}" if bottom else ""))
    axes.grid(True, axis="y")
    axes.set_xlim(-0.6, len(tasks) - 0.4)
    figure.legend(loc="outside upper center", ncols=min(3, len(names)))
    return figure


def _densities(tree: dict[str, Any]) -> Any:  # noqa: ANN401  (a figure)
    import matplotlib.pyplot as plt

    curves = {
        name: score.get("seeds", [score])[0]["cosine_density"]
        for name, target in tree["targets"].items()
        if (score := target["scores"].get("alignment"))
    }
    if not curves:
        return None
    figure, rows = plt.subplots(
        len(curves),
        sharex=True,
        sharey=True,
        squeeze=False,
        figsize=(COLUMN, 0.4 + 1.2 * len(curves)),
        layout="constrained",
    )
    shades = plt.get_cmap("viridis")(np.linspace(0.9, 0.05, 5))
    grid = np.array(next(iter(curves.values()))["cosine"])
    seen = [np.array(values) for densities in curves.values() for bin_, values in densities.items() if bin_ != "cosine"]
    inside = grid[np.max(seen, axis=0) > 0.01]
    for axes, (name, densities) in zip(rows[:, 0], curves.items(), strict=True):
        for shade, bin_ in zip(shades, (f"{low}-{low + 1}" for low in range(5)), strict=True):
            if bin_ in densities:
                axes.plot(grid, densities[bin_], color=shade, linewidth=1.1, label=bin_)
        axes.set_title(name, fontsize=8, loc="left")
        axes.set_ylabel("density")
    rows[-1, 0].set_xlabel("cosine of the pair")
    rows[0, 0].set(xlim=(inside.min(), 1), ylim=(0, 1.05 * np.max(seen)))
    handles, labels = rows[0, 0].get_legend_handles_labels()
    named = [f"gold {labels[0]}", *labels[1:]]
    figure.legend(
        handles, named, loc="outside upper center", ncols=5, handlelength=1, columnspacing=1, handletextpad=0.4
    )
    return figure
