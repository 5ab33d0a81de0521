"""Replacing the home folder by ~ and expanding it."""

import shlex
from pathlib import Path

import pytest

from promcse_pl.utils.paths import expand, hide_home, is_folder, is_plain_name, is_there, looks_like_path, run_command


@pytest.mark.parametrize(
    ("text", "hidden"),
    [
        ("/home/ada", "~"),
        ("/home/ada/x y.csv", "~/x y.csv"),
        ("cannot read /home/ada/x.csv:3 and '/home/ada/y'", "cannot read ~/x.csv:3 and '~/y'"),
        ("/home/adam/x", "/home/adam/x"),
        ("/home/ada-2/x", "/home/ada-2/x"),
        ("/mnt/home/ada/x", "/mnt/home/ada/x"),
        ("home/ada", "home/ada"),
    ],
)
def test_the_home_folder_is_hidden_and_nothing_else(text, hidden, monkeypatch):
    monkeypatch.setenv("HOME", "/home/ada")
    assert hide_home(text) == hidden
    if text.startswith("/home/ada"):
        assert expand(hidden) == Path(text)


def test_a_tree_of_plain_values_keeps_its_form(monkeypatch):
    monkeypatch.setenv("HOME", "/home/ada/")
    tree = {"a": ["/home/ada/x", 1, None], "/home/ada": {"b": ("/home/ada",)}, "c": 0.5}
    assert hide_home(tree) == {"a": ["~/x", 1, None], "~": {"b": ("~",)}, "c": 0.5}


@pytest.mark.parametrize("home", ["/", ""])
def test_a_home_that_is_the_root_hides_nothing(home, monkeypatch):
    monkeypatch.setenv("HOME", home)
    assert hide_home("/etc/x") == "/etc/x"


@pytest.mark.parametrize("name", ["x" * 300, "/" + "x/" * 5000, "a\0b", "~nobody-of-this-name/x"])
def test_a_name_that_no_file_can_have_is_not_there(name):
    assert not is_there(expand(name))
    assert not is_folder(expand(name))


NO_NAMES = [
    "../victim",
    "/abs",
    "a/b",
    "a\\b",
    "",
    ".",
    "..",
    "a\0b",
    "a\nb",
    "\x1b[2J",
    "x" * 256,
    "ä" * 128,
    None,
    7,
    ["0"],
]


@pytest.mark.parametrize("value", NO_NAMES)
def test_a_path_is_not_a_plain_name(value):
    assert not is_plain_name(value)


@pytest.mark.parametrize("value", ["0", "job 7", "seed=1", "..a", ".hidden", "ä", "x" * 255])
def test_a_name_of_a_file_is_a_plain_name(value):
    assert is_plain_name(value)


def test_printed_commands_are_quoted_for_any_folder_name():
    folder = "a 'b\" $c"
    assert shlex.split(run_command("-m", f"sweep.resume={folder}")) == [
        "python",
        "run.py",
        "-m",
        f"sweep.resume={folder}",
    ]
    assert run_command("resume=runs/1") == "python run.py resume=runs/1"


@pytest.mark.parametrize("name", ["/data/encoder", "./encoder", "../encoder", "~/encoder", ".", "a/b/c"])
def test_a_path_looks_like_a_path(name):
    assert looks_like_path(name)


@pytest.mark.parametrize("name", ["bert-base-uncased", "owner/name", "owner/name-1.5"])
def test_a_hub_id_does_not_look_like_a_path(name):
    assert not looks_like_path(name)
