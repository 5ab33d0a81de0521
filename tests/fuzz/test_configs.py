"""Any setting, any value, any command line and any config file: a valid config, or one ConfigError that names the key."""

import copy
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from support.configs import leaves, put, valid
from support.folders import ROOT
from support.fuzzing import examples, only_our_errors

from promcse_pl.config import Config, check_overrides
from promcse_pl.run_folder import read_config, write_config
from promcse_pl.runs.inputs import check_inputs

KEYS = sorted(leaves())
TRICKS = [
    *("../../etc/passwd", "/etc/passwd", "~root/.ssh", "~nobody-of-this-name/x", "a\0b", "${oc.env:HOME}", "${seed}", "file:///etc/passwd"),
    *("\ud800", "\u202e.csv", "👩‍👩‍👧.csv", "x" * 5000, "x" * 300 + ".csv", "", " ", "nul", "-1", "1e3"),
    *("null", "on", "\n", "{}", "[", "%s%n"),
    *("$(touch marker)", "`touch marker`", "; touch marker", "!!python/object/apply:os.system [touch marker]"),
]  # fmt: skip
NUMBERS = st.integers(-5, 600) | st.sampled_from([2**31, 2**63, 2**64, 10**400, -(10**400)]) | st.floats()
SIMPLE = st.none() | st.booleans() | NUMBERS | st.sampled_from(TRICKS) | st.text(max_size=10)
VALUES = (
    SIMPLE | st.lists(SIMPLE, max_size=3) | st.dictionaries(st.text(max_size=3) | st.integers(), SIMPLE, max_size=2)
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("fuzz")


@examples(3000)
@given(changes=st.dictionaries(st.sampled_from(KEYS), VALUES, min_size=1, max_size=3))
@example(changes={"optim.lr": 10**400})
@example(changes={"trainer.chunk_tokens": "x" * 5000})
@example(changes={"data.train": "\ud800"})
@example(changes={"tracking.tags": ["x" * 5000]})
@example(changes={"data.train": "a\0b.csv"})
@example(changes={"data.train": "~nobody-of-this-name/x.csv"})
@example(changes={"model.path": "~nobody-of-this-name/x"})
@example(changes={"model.path": "/a\0b"})
@example(changes={"evaluation.tasks": ["x" * 5000 + ".csv"]})
@example(changes={"data.cache_dir": "~nobody-of-this-name/x"})
def test_any_value_of_any_setting(folder, changes):
    raw = copy.deepcopy(valid())
    for key, value in changes.items():
        raw = put(raw, key, value)
    with only_our_errors("configs"):
        config = Config.from_dict(raw)
        numbers = [value for part in config.to_dict().values() if isinstance(part, dict) for value in part.values()]
        assert not [value for value in numbers if isinstance(value, float) and not math.isfinite(value)]
        write_config(config, folder / "config.yaml")
        assert read_config(folder / "config.yaml") == config
        check_inputs(config)


@examples(1000)
@given(
    arguments=st.lists(
        st.sampled_from([*KEYS, "model", "data", "hydra.run.dir", "++seed", "~loss", "+x"]) | st.text(max_size=8),
        max_size=3,
    ),
    value=SIMPLE,
)
def test_any_override(arguments, value):
    groups = {"model": ["minilm", "bert-base"], "data": ["demo"]}
    with only_our_errors("overrides"):
        check_overrides([f"{argument}={value}" for argument in arguments], groups)


YAML = st.sampled_from(
    [
        b"model:\n",
        b"  path: demo\n",
        b"seed: 1\n",
        b"- 1\n",
        b"&a [*a]",
        b"{1: 2}",
        b"? [a]\n: 1\n",
        b"!!python/name:os.system x",
        b"\t",
        b"\xff",
    ]
)
BOMB = b"a: &a [x, x, x, x, x, x, x, x, x]\n" + b"".join(
    b"%c: &%c [%s]\n" % (98 + i, 98 + i, b", ".join([b"*%c" % (97 + i)] * 9)) for i in range(12)
)  # fmt: skip


@examples(1000)
@given(content=st.lists(YAML | st.binary(max_size=12), max_size=8).map(b"".join))
@example(content=b"model: &a [*a]\n")
@example(content=BOMB + b"model: *m\n")
@example(content=BOMB.replace(b"a: &a", b"seed: &a", 1).replace(b"m: &m", b"loss: &m"))
@example(content=b"model: {path: !!python/object/apply:os.system [touch marker]}")
@example(content=b"[" * 5000)
@example(content=b"seed: 2026-11-27\n")
def test_any_config_file(folder, content):
    (folder / "any.yaml").write_bytes(content)
    with only_our_errors("config files"):
        read_config(folder / "any.yaml")


HARD = [
    ["data.train=../../../etc/passwd"],
    ["tracking.name=$(touch marker)", "data.cache_dir=`touch marker`"],
    ["loss.temperature=nan"],
    ["optim.lr=1e999"],
    ["data.train=\u202e👩‍👩‍👧.csv"],
    ["model.path=${oc.env:HOME}/x"],
    ["seed=" + "9" * 5000],
    ["data.columns=[" * 50],
    ["data.train='a\\x00b.csv'"],
]


@pytest.mark.parametrize("arguments", HARD, ids=range(len(HARD)))
def test_the_real_command_line_ends_with_settings_or_one_line(arguments, tmp_path):
    environment = {**os.environ, "HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, str(ROOT / "run.py"), *arguments, "--cfg", "job"]
    done = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False, timeout=60
    )
    assert "Traceback" not in done.stderr + done.stdout
    assert done.returncode == 0 or len(done.stderr.strip().splitlines()) <= 12, done.stderr
    assert not list(tmp_path.rglob("*")), "something was written"
