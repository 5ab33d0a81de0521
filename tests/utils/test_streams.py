"""Names, errors and log lines on a terminal: control characters from files are escaped."""

import io
import json
import logging
import os
import pty
import shlex
import subprocess
import sys

import pytest
from rich.console import Console

from promcse_pl.cli.main import main
from promcse_pl.run_folder import Status, write_status, write_text
from promcse_pl.utils.errors import DataError, write_error
from promcse_pl.utils.streams import visible
from promcse_pl.utils.terminal import config_tree, logging_to

EVIL = "\x1b[2J\x1b]0;owned\x07\r\u202eevil\x9b\x7f\n[bold]x[/y]\u2066\ud800"
SHOWN = r"\x1b[2J\x1b]0;owned\x07\r\u202eevil\x9b\x7f\n[bold]x[/y]\u2066\ud800"


def test_control_characters_are_escaped_and_other_text_is_unchanged():
    assert visible(EVIL) == SHOWN
    for text in ("ä ß 漢字 \t|", "שלום", "مرحبا", "a\u200db", "\U0001f469\u200d\U0001f52c", "\\x1b"):
        assert visible(text) == text


def test_an_error_is_one_line_without_control_characters(capsys):
    write_error(DataError(f"{EVIL} is not there"))
    assert capsys.readouterr().err == f"error: {SHOWN} is not there\n"


def test_a_shell_expands_the_home_folder_of_a_quoted_path_in_an_error(capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    quoted = shlex.quote(f"{tmp_path}/my data/it's x")
    write_error(DataError(f"Try: rm {quoted}-[0-9].* data.train='{tmp_path}/a b'"))
    command = capsys.readouterr().err.removeprefix("error: Try: ")
    assert command.startswith("rm ~/'my data/it'")
    assert command.endswith("-[0-9].* data.train='~/a b'\n")
    typed = f"printf %s {command[3:].split('-[0-9]')[0]}"
    assert subprocess.run(typed, shell=True, capture_output=True, text=True).stdout == f"{tmp_path}/my data/it's x"


def test_log_lines_on_the_terminal_and_in_the_file_hold_no_control_characters(tmp_path):
    printed = io.StringIO()
    with logging_to(tmp_path / "run.log", Console(file=printed, width=200)):
        logging.getLogger("promcse_pl").warning("read %s", EVIL)
    assert printed.getvalue() == f"warning: read {SHOWN}\n"
    assert (tmp_path / "run.log").read_text().endswith(f" WARNING read {SHOWN}\n")


def test_the_config_tree_prints_markup_literally():
    printed = io.StringIO()
    Console(file=printed, width=300).print(
        config_tree({"tracking": {"name": EVIL, "tags": ["[/red]", "[bold]"]}, "seed": EVIL})
    )
    assert f"name: {SHOWN}" in printed.getvalue()
    assert "tags: ['[/red]', '[bold]']" in printed.getvalue()
    assert f"seed: {SHOWN}" in printed.getvalue()


def test_a_report_shows_names_settings_and_errors_of_a_sweep_without_control_characters(tmp_path, capsys):
    raw = {"format": 1, "overrides": [], "jobs": []}
    for number, name in enumerate(("a[b]", "\u202ejob")):
        overrides = [f"data.train=[red]\x1b[31m{number}", f"seed={number}"]
        raw["jobs"].append({"folder": name, "overrides": overrides})
        write_text(tmp_path / name / "config.yaml", "seed: 1\n")
        write_status(tmp_path / name, Status(state="failed", error="first \x1b[2J\nsecond \x1b[2J"))
    (tmp_path / "sweep.json").write_text(json.dumps(raw))
    assert main(["report", str(tmp_path)]) == 0
    printed = capsys.readouterr()
    assert not {"\x1b", "\u202e", "\r"} & {*printed.out, *printed.err}
    assert r"[red]\x1b[31m0" in printed.out.replace("\n", "")
    assert "a[b] failed: first \\x1b[2J\n  second \\x1b[2J\n" in printed.out


@pytest.mark.parametrize("terminal", [True, False])
def test_found_sentences_are_escaped_on_a_terminal_and_exact_in_a_pipe(terminal, trained_run, tmp_path, monkeypatch):
    (tmp_path / "corpus.txt").write_text("a \x1b[31mred cat\n")
    reader, writer = pty.openpty() if terminal else os.pipe()
    with os.fdopen(writer, "w") as stream:
        monkeypatch.setattr(sys, "stdout", stream)
        assert (
            main(["search", str(trained_run.folder), str(tmp_path / "corpus.txt"), "a cat", "--threshold", "-1"]) == 0
        )
        stream.flush()
        printed = os.read(reader, 1000).decode()
    os.close(reader)
    assert printed.rstrip().endswith("\ta \\x1b[31mred cat" if terminal else "\ta \x1b[31mred cat")
