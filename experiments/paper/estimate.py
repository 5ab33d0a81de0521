"""Dry run: compose every config of a study, and estimate steps, time and memory of a run without training."""

from study import MODELS, Row, Study, selected_rows
from training import Workspace

from promcse_pl.config import Config
from promcse_pl.runs.compose import compose_config
from promcse_pl.utils.errors import PromcseError
from promcse_pl.utils.paths import run_command

ROWS = {"triplets": 275_601, "sentences": 1_000_000}
"""Rows of the paper's training files: nli_for_simcse.csv and wiki1m_for_simcse.txt."""
TOKENS = {"triplets": 47, "sentences": 52}
"""Mean number of tokens per row (three sentences, or one sentence twice) in our files, special tokens included."""
RATES = {"gpu": 60e12, "cpu": 80e9}
"""FLOP per second. `gpu`: assumed for a data-centre GPU in bfloat16, not measured. `cpu`: MiniLM on two cores in float32."""
ACTIVATION_BYTES = 34
"""Per token, layer and unit of width, in bfloat16 (Korthikanti et al. 2022, eq. 1, without the attention scores)."""


def estimate(model: str, config: Config, sample: int) -> tuple[int, float, float]:
    """Return the optimiser steps of a run, its hours and its memory in GB, without activation checkpointing.

    Args:
        model: Choice of `model`.
        config: The composed config.
        sample: Rows of the sample; 0 for the whole data.
    """
    layers, width, vocabulary = MODELS[model]
    weights = 12 * layers * width**2
    rows, batch = sample or ROWS[config.data.kind], config.data.batch_size
    steps = config.trainer.epochs * -(-rows // batch)
    steps = min(steps, config.trainer.max_steps or steps)
    is_full = getattr(getattr(config, "tuning", None), "weights", "prompt") == "full"
    tokens = batch * TOKENS[config.data.kind]
    flop = (6 if is_full else 4) * weights * tokens * steps  # a frozen weight has no gradient
    hours = flop / RATES["cpu" if sample else "gpu"] / 3600
    everything = weights + vocabulary * width
    memory = ACTIVATION_BYTES * layers * width * tokens * (2 if sample else 1) + everything * (16 if is_full else 4)
    return steps, hours, memory / 1e9


def dry_run(
    name: str, study: Study, workspace: Workspace, seeds: tuple[int, ...], only: tuple[str, ...] = ()
) -> list[str]:
    """Print the command and the estimates of the selected rows of a study; return the errors of invalid configs."""
    failed, hours, rows = [], 0.0, selected_rows(study, only)
    for row in rows:
        problem = _print_row(row, workspace, seeds[0])
        if isinstance(problem, str):
            failed.append(problem)
        else:
            hours += problem * len(seeds)
    print(f"{name}: {len(rows)} rows x {len(seeds)} seeds, about {hours:.1f} hours of training without dev evaluations")
    return failed


def _print_row(row: Row, workspace: Workspace, seed: int) -> str | float:
    """Print the command and the estimates of a row; return its hours, or the error of its config."""
    print(f"\n{row.name}")
    try:
        overrides = workspace.overrides(row, seed)
        print(f"  {run_command(*overrides)}")
        config = compose_config(overrides, {})
    except PromcseError as error:
        print(f"  invalid config: {error}")
        return f"{row.name}: {error}"
    steps, hours, memory = estimate(workspace.model, config, workspace.rows)
    time = f"{60 * hours:.0f} minutes" if hours < 1 else f"{hours:.1f} hours"
    print(
        f"  {steps:,} steps of {config.data.batch_size} rows, lr {config.optim.lr:g}; about {time} on a "
        f"{'CPU' if workspace.rows else 'GPU'}, {memory:.1f} GB without activation checkpointing"
    )
    return hours
