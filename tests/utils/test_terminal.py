"""Output is readable at 80 columns and can be copied."""

import io
import logging

from rich.console import Console

from promcse_pl.config import Config
from promcse_pl.utils.terminal import ConsoleHandler, config_tree, stages


def printed(thing: object, width: int = 80) -> str:
    console = Console(file=io.StringIO(), width=width)
    console.print(thing)
    return console.file.getvalue()


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


def test_the_bar_of_many_parts_shows_the_present_one_on_a_terminal_and_nothing_in_a_pipe():
    for is_terminal, shown in ((True, True), (False, False)):
        console = Console(file=io.StringIO(), width=80, force_terminal=is_terminal)
        with stages(console) as report:
            report("adapter: CxC-STS", 250, 1000)
        assert ("adapter: CxC-STS" in console.file.getvalue()) is shown
