"""What is printed can be read at 80 columns and copied."""

import io
import logging

from rich.console import Console

from promcse_pl.config import Config
from promcse_pl.evaluation.sts import TASKS
from promcse_pl.terminal import ConsoleHandler, config_tree, score_table


def printed(thing: object, width: int = 80) -> str:
    console = Console(file=io.StringIO(), width=width)
    console.print(thing)
    return console.file.getvalue()


def test_the_table_of_all_tasks_fits_80_columns_uncut():
    tasks = [*TASKS, "Avg", "dev"]
    scores = {"frozen encoder": dict.fromkeys(tasks, 78.87), "adapter": dict.fromkeys(tasks, 80.12)}
    lines = printed(score_table("Spearman x 100 (higher is better)", scores)).splitlines()
    rows = {line.split("  ")[0].strip(): line.split() for line in lines if line.strip()}
    head = next(line for line in lines if "STS12" in line)
    assert head.split() == tasks
    assert rows["frozen encoder"][2:] == ["78.87"] * 9
    assert rows["adapter"][1:] == ["80.12"] * 9
    assert rows["gain"][1:] == ["+1.25"] * 9
    assert "…" not in "".join(lines)


def test_a_single_model_has_no_gain():
    assert "gain" not in printed(score_table("title", {"adapter": {"dev": 1.0}}))


def test_a_log_line_is_not_broken_and_a_warning_says_so():
    console = Console(file=io.StringIO(), width=40)
    handler = ConsoleHandler(console)
    path = "/a/long/path" * 20 + "/with [brackets]"
    for level in (logging.INFO, logging.WARNING):
        handler.emit(logging.LogRecord("promcse_pl", level, "", 0, "wandb sync %s", (path,), None))
    assert console.file.getvalue() == f"wandb sync {path}\nwarning: wandb sync {path}\n"


def test_the_config_tree_shows_every_setting():
    config = Config.from_dict({"model": {"path": "m"}, "data": {"kind": "triplets", "train": "demo"}}).to_dict()
    text = printed(config_tree(config), width=200)
    for part, values in config.items():
        for name, value in values.items() if isinstance(values, dict) else [(part, values)]:
            assert f"{name}: {'null' if value is None else value}" in text
