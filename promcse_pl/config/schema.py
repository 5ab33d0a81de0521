"""The schema of a run: every setting with its unit, range and source. Nothing is read or built before all of it is valid.

`Config.from_dict` takes the plain dictionary that Hydra (or a saved config.yaml) gives, and raises `ConfigError` with the key,
the value, what is allowed and what to type.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import re
import reprlib
import types
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import yaml

from promcse_pl.utils.errors import ConfigError
from promcse_pl.utils.paths import SUFFIXES, file_suffix

Kind = Literal["sentences", "pairs", "triplets"]
WIDTH: dict[Kind, int] = {"sentences": 1, "pairs": 2, "triplets": 3}
"""Texts in a row of each kind of training data."""
DATA_SUITES = ("sts", "sick", "cxc", "transfer", "geometry")
"""Suites of the evaluation that are read from a data folder."""
SUITES = (*DATA_SUITES, "demo")


Decides = Literal["training", "scores", "execution"]
"""What a setting affects: the trained adapter (default), its evaluation scores, or only the execution of the run (memory,
speed, saves, logs). See `decides`."""
SCORES: dict[str, Decides] = {"decides": "scores"}
EXECUTION: dict[str, Decides] = {"decides": "execution"}


_REPR = reprlib.Repr()
_REPR.maxstring = _REPR.maxother = _REPR.maxlong = 300
_LONGEST_PART, _LONGEST = 255, 4000
"""Bytes of a part of a path and of a whole one: no system takes longer names."""


def _shown(value: object) -> str:
    """Return a value as Python writes it, cut where nobody would read on."""
    try:
        return _REPR.repr(value)
    except ValueError:  # Python writes no integer of more than 4300 digits
        return f"a {type(value).__name__} of thousands of digits"


def _require(ok: bool, key: str, value: object, allowed: str, example: object) -> None:
    if not ok:
        raise ConfigError(f"{key} must be {allowed}, got {_shown(value)}. Try: {_command(key)} {key}={example}")


def _command(key: str) -> str:
    return "python run.py -m" if key.startswith("sweep.") else "python run.py"


@dataclass(kw_only=True, slots=True)
class ModelConfig:
    """The frozen encoder and how its token vectors become a sentence vector."""

    path: str
    """Local folder, or hub id (an installed weight wheel of that id is used before the hub)."""
    revision: str | None = None
    """Commit, tag or branch on the hub; None for the newest."""
    pooling: Literal["cls", "cls_before_pooler", "avg", "avg_top2", "avg_first_last"] = "cls"
    """What is pooled (paper, section 3; the avg poolers as in SimCSE)."""
    head: Literal["none", "mlp", "mlp_train_only"] = "mlp"
    """MLP on the pooled vector: none, kept (supervised recipe), or left out of the test-time vector (unsupervised recipe)."""

    def __post_init__(self) -> None:
        _require(bool(self.path.strip()), "model.path", self.path, "a folder or a hub id", "bert-base-uncased")
        if self.pooling == "cls_before_pooler" and self.head != "none":
            raise ConfigError(
                f"model.pooling=cls_before_pooler means the vector before the MLP, so model.head={self.head} has no place. "
                "Try: model.pooling=cls_before_pooler model.head=none, or model.pooling=cls model.head=mlp_train_only"
            )


@dataclass(kw_only=True, slots=True)
class DataConfig:
    """Training rows, development set, and where files lie."""

    kind: Kind
    """Texts in a row: one sentence (seen twice), anchor and positive, or anchor, positive and hard negative."""
    train: str
    """`demo`, a .csv, .tsv, .txt, .jsonl or .parquet file (.gz too), or a folder written by `save_to_disk` of the datasets
    library (split `train` of a DatasetDict); a relative path is searched in data.dir, then in the current folder."""
    dev: str | None = None
    """`demo`, `stsb` (needs data.dir), `holdout` (a part of the training triplets is kept back), a file of two texts and a
    score, or None: no selection, the last step is kept."""
    dir: str | None = None
    """Folder of data sets: nli/, wiki/, senteval/."""
    columns: list[str | int] | None = None
    """Columns of the texts, by name or 0-based position; None: matched by known names (promcse_pl/data/columns.py), or by
    position if the file has no other columns."""
    header: bool | None = None
    """Whether a csv or tsv file begins with column names; None: yes, but a first row that looks like data stops the run."""
    on_bad_row: Literal["stop", "skip"] = "stop"
    """A broken row stops the run, or is skipped, counted and listed in the run's folder."""
    max_rows: int | None = None
    """Use only the first so many rows, >= 2; None: all."""
    max_length: int = 32
    """Tokens of a training sentence, special ones included, in [3, 512]; longer ones are cut (official: 32)."""
    batch_size: int = 256
    """Rows in a step, of all processes together, >= 2 (official: 64 to 512)."""
    cache_dir: str | None = field(default=None, metadata=EXECUTION)
    """Folder of the token cache; None: $XDG_CACHE_HOME/promcse_pl or ~/.cache/promcse_pl."""

    def __post_init__(self) -> None:
        _require(bool(self.train.strip()), "data.train", self.train, "`demo` or a file", "my.csv")
        _require(3 <= self.max_length <= 512, "data.max_length", self.max_length, "in [3, 512] tokens", 32)
        _require(self.batch_size >= 2, "data.batch_size", self.batch_size, "at least 2 (a row needs others)", 256)
        _require(
            self.max_rows is None or self.max_rows >= 2, "data.max_rows", self.max_rows, "at least 2, or null", 1000
        )
        width = WIDTH[self.kind]
        if self.columns is not None and len(self.columns) != width:
            raise ConfigError(
                f"data.columns must name {width} columns for data.kind={self.kind}, got {_shown(self.columns)}. "
                f"Try: 'data.columns=[{','.join(('sent0', 'sent1', 'hard_neg')[:width])}]'"
            )
        if self.dev == "holdout" and self.kind != "triplets":
            raise ConfigError(
                f"data.dev=holdout needs triplets (positives against hard negatives), got data.kind={self.kind}. "
                "Try: data.dev=FILE with two texts and a score, or data.dev=null"
            )


@dataclass(kw_only=True, slots=True)
class LossConfig:
    """NT-Xent + hinge_weight x energy hinge + mlm_weight x MLM (paper, eq. 12)."""

    temperature: float = 0.05
    """Divides the cosines in NT-Xent, in [0.001, 10] (paper, section 4.1). Smaller values overflow or saturate float32 logits."""
    margin: float = 0.2
    """Cosine gap between the positive and the hardest negative, in [0, 2] (paper, section 4.2)."""
    hinge_weight: float = 10.0
    """Lambda of the energy hinge, in [0, 10000]; 0 switches it off; needs triplets (paper, section 4.2)."""
    hard_negative_logit: float = 0.0
    """Added to an anchor's logit for its own hard negative, in [-1000, 1000] (official --hard_negative_weight)."""
    mlm_weight: float = 0.0
    """Weight of the masked-language-model task at step 0, in [0, 10]; it falls by 0.95 every 100 steps (official: 0.1 for
    unsupervised RoBERTa)."""

    def __post_init__(self) -> None:
        _require(
            0.001 <= self.temperature <= 10,
            "loss.temperature",
            self.temperature,
            "in [0.001, 10] (cosines are divided by it)",
            0.05,
        )
        _require(0 <= self.margin <= 2, "loss.margin", self.margin, "in [0, 2] (a difference of cosines)", 0.2)
        _require(0 <= self.hinge_weight <= 10_000, "loss.hinge_weight", self.hinge_weight, "in [0, 10000]", 10)
        _require(
            -1000 <= self.hard_negative_logit <= 1000,
            "loss.hard_negative_logit",
            self.hard_negative_logit,
            "in [-1000, 1000]",
            0,
        )
        _require(0 <= self.mlm_weight <= 10, "loss.mlm_weight", self.mlm_weight, "in [0, 10]", 0.1)


@dataclass(kw_only=True, slots=True)
class PromptConfig:
    """The trained keys and values in front of every layer."""

    kind: Literal["deep", "projected"] = "deep"
    """Free keys and values for every layer, or made by an MLP from one embedding (official --prefix_projection)."""
    length: int = 10
    """Prompt slots P of every layer, in [0, 256] (paper: 10 to 16)."""
    projection_size: int | None = None
    """Hidden width of the MLP with kind=projected, >= 1 (official: 512)."""
    dropout: float | None = None
    """Probability of dropping a prompt channel in training, in [0, 1); None: the encoder's own (official)."""
    position_offset: int | None = None
    """Shift of the token positions, >= 0; None: P (official)."""

    def __post_init__(self) -> None:
        _require(0 <= self.length <= 256, "prompt.length", self.length, "in [0, 256] slots", 10)
        _require(
            self.dropout is None or 0 <= self.dropout < 1, "prompt.dropout", self.dropout, "in [0, 1), or null", 0.1
        )
        _require(
            self.position_offset is None or self.position_offset >= 0,
            "prompt.position_offset",
            self.position_offset,
            "at least 0, or null",
            self.length,
        )
        if self.kind == "projected":
            _require(
                self.projection_size is not None and self.projection_size >= 1,
                "prompt.projection_size",
                self.projection_size,
                "at least 1 with prompt.kind=projected",
                512,
            )
            _require(self.length > 0, "prompt.length", self.length, "at least 1 with prompt.kind=projected", 10)
        elif self.projection_size is not None:
            raise ConfigError(
                f"prompt.projection_size={self.projection_size} has no effect with prompt.kind=deep. "
                "Try: prompt.kind=projected, or prompt.projection_size=null"
            )


@dataclass(kw_only=True, slots=True)
class OptimConfig:
    """AdamW (0.9, 0.999, eps 1e-8, no weight decay) with linear decay to 0 and no warm-up (official)."""

    lr: float = 1e-2
    """Learning rate at step 0, in (0, 1] (paper: 5e-3 to 3e-2)."""
    clip_norm: float = 1.0
    """Bound on the joint gradient norm, > 0 (official: 1.0)."""

    def __post_init__(self) -> None:
        _require(0 < self.lr <= 1, "optim.lr", self.lr, "in (0, 1]", 0.01)
        _require(0 < self.clip_norm < math.inf, "optim.clip_norm", self.clip_norm, "a finite number > 0", 1.0)


@dataclass(kw_only=True, slots=True)
class TrainerConfig:
    """How long, how often, and on what."""

    epochs: int = 10
    """Passes over the training rows, >= 1 (official: 10 supervised, 1 unsupervised)."""
    max_steps: int | None = None
    """Stop after so many optimiser steps, >= 1; the learning rate then falls to 0 at that step. None: after the epochs."""
    eval_every: int = 125
    """Steps between two looks at the development set, >= 1 (official: 125)."""
    log_every: int = field(default=10, metadata=EXECUTION)
    """Steps between two entries of the history, >= 1."""
    save_every: int | None = field(default=100, metadata=EXECUTION)
    """Steps between two saves that a killed run goes on from (`python run.py resume=FOLDER`), >= 1; None: only at the last step
    and when a signal stops the run."""
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    """Where to compute; auto takes a GPU if there is one."""
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """Type of the frozen encoder while training; auto measures which is faster here. Prompt, head, loss and optimiser are
    always float32, and so is the final evaluation."""
    layers: Literal["auto", "library"] = "auto"
    """Layers of the frozen encoder in training. auto: fused CPU layers for BERT and RoBERTa on a CPU unless modules have hooks;
    library: always the modules of transformers. Results differ by rounding and by the dropout masks that are drawn."""
    chunk_tokens: int | Literal["auto"] | None = field(default="auto", metadata=EXECUTION)
    """Tokens (padding included) that pass the encoder at once, >= 1; auto takes what suits the device; None: the whole
    batch. It affects speed and memory, not the loss; dropout masks are sampled per chunk, so they change with the size."""
    recompute: Literal["auto", "always", "never"] = field(default="auto", metadata=EXECUTION)
    """Run each chunk again in the backward pass instead of keeping its tensors: memory of a chunk, not of a batch, for half as
    much computation more. auto: if the tensors of a batch would take more than half of the free memory."""
    devices: int = 1
    """Processes (ranks) on each machine, in [1, 64]; on GPUs one a GPU. They cut each batch of data.batch_size rows into shares
    and train what one process would (docs/distributed.md)."""
    num_nodes: int = 1
    """Machines, in [1, 1024]; several are started by torchrun or srun (docs/distributed.md)."""

    @property
    def world_size(self) -> int:
        """Processes of the run, on all machines."""
        return self.devices * self.num_nodes

    def __post_init__(self) -> None:
        for name in ("epochs", "eval_every", "log_every"):
            _require(getattr(self, name) >= 1, f"trainer.{name}", getattr(self, name), "at least 1", 1)
        _require(1 <= self.devices <= 64, "trainer.devices", self.devices, "in [1, 64] processes a machine", 2)
        _require(1 <= self.num_nodes <= 1024, "trainer.num_nodes", self.num_nodes, "in [1, 1024] machines", 1)
        if self.device == "mps" and self.world_size > 1:
            raise ConfigError(
                "trainer.device=mps trains in one process. Try: trainer.devices=1 trainer.num_nodes=1, or trainer.device=cpu"
            )
        for name, allowed in (
            ("max_steps", "at least 1, or null"),
            ("save_every", "at least 1, or null"),
            ("chunk_tokens", "at least 1, auto, or null"),
        ):
            value = getattr(self, name)
            _require(value in (None, "auto") or value >= 1, f"trainer.{name}", value, allowed, 1000)


@dataclass(kw_only=True, slots=True)
class TrackingConfig:
    """Weights & Biases. The local history (metrics.jsonl) is always written."""

    wandb: Literal["auto", "online", "offline", "disabled"] = "auto"
    """auto: online with a key, offline without one. The environment variable WANDB_MODE wins."""
    project: str = "promcse"
    """W&B project."""
    entity: str | None = None
    """W&B user or team; None: the account's default."""
    group: str | None = None
    """W&B group."""
    name: str | None = None
    """W&B run name; None: the name of the run's folder."""
    tags: list[str] = field(default_factory=list)
    """W&B tags."""


@dataclass(kw_only=True, slots=True)
class EvaluationConfig:
    """What the finished adapter is scored on, beside the frozen encoder."""

    tasks: list[str] = field(default_factory=list)
    """Suites, or files of two texts and a score. `sts`: STS12-16 and STS-B; `sick`: SICK-R; `cxc`: CxC-STS; `transfer`: seven
    classification tasks; `geometry`: of STS-B's vectors; all from data.dir. `demo`: the demo's test pairs. The development
    score is always shown."""
    frozen: bool = True
    """Also score the frozen encoder, for comparison."""

    def __post_init__(self) -> None:
        check_tasks(self.tasks, "python run.py 'evaluation.tasks=[{}]'")


@dataclass(kw_only=True, slots=True)
class Config:
    """Everything that decides a run."""

    model: ModelConfig
    data: DataConfig
    loss: LossConfig
    prompt: PromptConfig
    optim: OptimConfig
    trainer: TrainerConfig
    tracking: TrackingConfig = field(metadata=EXECUTION)
    evaluation: EvaluationConfig = field(metadata=SCORES)
    seed: int = 42
    """Seed of weights, dropout, masks and batch order, in [0, 2**32) (official: 42)."""

    def __post_init__(self) -> None:
        _require(0 <= self.seed < 2**32, "seed", self.seed, "in [0, 2**32)", 42)
        if self.loss.hinge_weight and self.data.kind != "triplets":
            raise ConfigError(
                f"loss.hinge_weight={self.loss.hinge_weight:g} needs hard negatives, but data.kind={self.data.kind} has none. "
                "Try: loss.hinge_weight=0, or data=triplets data.train=FILE"
            )
        if self.loss.hard_negative_logit and self.data.kind != "triplets":
            raise ConfigError(
                f"loss.hard_negative_logit={self.loss.hard_negative_logit:g} has no effect with data.kind={self.data.kind}: "
                "there are no hard negatives. Try: loss.hard_negative_logit=0"
            )
        if not self.loss.hinge_weight and self.loss.margin != LossConfig().margin:
            raise ConfigError(
                f"loss.margin={self.loss.margin:g} has no effect with loss.hinge_weight=0. Try: loss.hinge_weight=10 (triplets "
                "only), or leave loss.margin out"
            )
        if self.data.train == "demo" and (self.data.columns is not None or self.data.header is not None):
            raise ConfigError("data.columns and data.header have no effect on the demo data. Try: data.train=FILE")
        if self.data.batch_size < self.trainer.world_size:
            raise ConfigError(
                f"data.batch_size={self.data.batch_size} rows cannot be shared by {self.trainer.world_size} processes "
                f"(trainer.devices x trainer.num_nodes). Try: data.batch_size={self.trainer.world_size}, or fewer processes"
            )
        if self.prompt.length == 0 and self.model.head == "none":
            raise ConfigError(
                "prompt.length=0 with model.head=none leaves nothing to train. Try: prompt.length=10, or model.head=mlp"
            )
        if self.data.train == "demo" and self.data.kind != "triplets":
            raise ConfigError(f"the demo data are triplets, got data.kind={self.data.kind}. Try: data=demo alone")
        needs_dir = ["data.dev=stsb"] if self.data.dev == "stsb" else []
        if tasks := [task for task in self.evaluation.tasks if task in DATA_SUITES]:
            needs_dir.append(f"evaluation.tasks=[{','.join(tasks)}]")
        if needs_dir and self.data.dir is None:
            train = (
                "" if self.data.train == "demo" or self.data.train.startswith(("/", ".", "~")) else " data.train=FILE"
            )
            raise ConfigError(
                f"{' and '.join(needs_dir)} read data.dir/senteval, but data.dir is not set. Try: data.dir=FOLDER with "
                f"senteval/ in it, or data.dev=null 'evaluation.tasks=[]'{train}"
            )

    @classmethod
    def from_dict(cls, raw: dict[str, Any]) -> Config:
        """Check a plain dictionary against the schema.

        Raises:
            ConfigError: An unknown or missing key, a wrong type, a value out of range, or settings that exclude each other.
        """
        config: Config = _build(cls, raw, "")
        return config

    def to_dict(self) -> dict[str, Any]:
        """Return plain values; `from_dict` gives an equal config back."""
        return dataclasses.asdict(self)


@dataclass(kw_only=True, slots=True)
class SweepConfig:
    """How a sweep (`python run.py -m`) is run; no part of a job's config."""

    parallel: int = 1
    """Jobs at a time, >= 1; each gets its share of the CPU's threads, or of the GPUs."""
    resume: str | None = None
    """Folder of a sweep to go on with: what is finished is left alone."""
    trials: int | None = None
    """Jobs of a search, >= 1; None: every combination of the values given."""
    prune: bool = True
    """A search stops a job whose development score is in the worse half at a quarter or at half of its steps."""
    seed: int = 42
    """Seed of the search, in [0, 2**31)."""

    def __post_init__(self) -> None:
        _require(self.parallel >= 1, "sweep.parallel", self.parallel, "at least 1", 2)
        _require(self.trials is None or self.trials >= 1, "sweep.trials", self.trials, "at least 1, or null", 30)
        _require(0 <= self.seed < 2**31, "sweep.seed", self.seed, "in [0, 2**31)", 42)

    @classmethod
    def from_dict(cls, raw: dict[str, Any]) -> SweepConfig:
        """Check a plain dictionary against the schema.

        Raises:
            ConfigError: As for `Config.from_dict`.
        """
        settings: SweepConfig = _build(cls, raw, "sweep")
        return settings


def check_tasks(tasks: Sequence[str], command: str) -> None:
    """Refuse a task that is neither a suite nor a file of pairs.

    Args:
        tasks: Suites, or files of two texts and a score.
        command: What to type, with {} where the tasks stand.

    Raises:
        ConfigError: With the nearest suite.
    """
    for task in tasks:
        if task not in SUITES and file_suffix(Path(task)) not in SUFFIXES and "/" not in task:  # / : a saved dataset
            (near,) = difflib.get_close_matches(task[:60], SUITES, n=1, cutoff=0) or SUITES[:1]
            raise ConfigError(
                f"a task must be a suite ({', '.join(SUITES)}) or a file of two texts and a score ({', '.join(SUFFIXES)}, "
                f"or the folder of a saved dataset with a / in its path), got {_shown(task)}. Try: {command.format(near)}"
            )


def setting_keys(schema: type = Config, prefix: str = "") -> dict[str, list[str]]:
    """Return the dotted keys of the schema, grouped by the part they belong to ("" for the top level)."""
    keys: dict[str, list[str]] = {prefix: []}
    for name, hint in get_type_hints(schema).items():
        if dataclasses.is_dataclass(hint):
            keys |= setting_keys(hint, name)  # type: ignore[arg-type]
        else:
            keys[prefix].append(f"{prefix}.{name}" if prefix else name)
    return keys


def flat_settings(tree: Mapping[Any, Any], prefix: str = "") -> dict[str, Any]:
    """Return a tree of settings with dotted keys, as they are typed."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= flat_settings(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return flat


def decides(key: str) -> Decides:
    """Return what a dotted key of a job's config affects; keys that are not in the schema count as training."""
    schema: Any = Config
    for name in key.split("."):
        item = next((item for item in dataclasses.fields(schema) if item.name == name), None)
        if item is None:
            return "training"
        if "decides" in item.metadata:
            kind: Decides = item.metadata["decides"]
            return kind
        schema = get_type_hints(schema)[name]
        if not dataclasses.is_dataclass(schema):
            return "training"
    return "training"


def resumed_with(config: Config, overrides: Sequence[str]) -> Config:
    """Return the config of a resumed run with overrides of its execution settings.

    Args:
        config: Config of the run.
        overrides: `key=value`, the value as YAML.

    Raises:
        ConfigError: An unknown key, a key that affects training or scores, or an invalid value.
    """
    tree, parts = config.to_dict(), setting_keys()
    keys = [key for part in parts.values() for key in part]
    for override in overrides:
        key, equals, text = override.partition("=")
        if key not in keys and key not in parts and not key.startswith(("sweep.", "hydra")):
            raise unknown_key(key)
        if not equals or key not in keys or decides(key) != "execution":
            allowed = ", ".join(name for name in keys if decides(name) == "execution")
            raise ConfigError(
                f"{override[:200]} cannot be changed when resuming, since it may affect training or scores. Allowed: {allowed}. "
                f"Try: leave {key} out, or start a new run"
            )
        try:
            value = yaml.safe_load(text) if text.strip() else ""
        except (ValueError, RecursionError, yaml.YAMLError):
            raise ConfigError(f"the value of {key} cannot be read: {_shown(text)}. Try: {key}='\"TEXT\"'") from None
        part, _, name = key.rpartition(".")
        tree[part][name] = value
    return Config.from_dict(tree)


def is_integer(key: str) -> bool:
    """Tell whether a dotted key of a job's config holds an integer (or null)."""
    hint: Any = Config
    for name in key.split("."):
        hint = get_type_hints(hint).get(name) if dataclasses.is_dataclass(hint) else None
    return hint is int or set(get_args(hint)) == {int, types.NoneType}


_OTHER_NAMES = {
    "data.batch_size": ("train_batch_size", "per_device_train_batch_size", "bs"),
    "data.max_length": ("max_seq_length", "max_seq_len", "max_len"),
    "data.train": ("train_file", "train_path"),
    "loss.temperature": ("temp", "tau"),
    "model.path": ("model_name", "model_name_or_path", "encoder"),
    "model.pooling": ("pooler", "pooler_type"),
    "optim.clip_norm": ("max_grad_norm", "gradient_clip_val"),
    "optim.lr": ("learning_rate",),
    "prompt.length": ("pre_seq_len", "num_virtual_tokens"),
    "trainer.devices": ("gpus", "num_gpus", "num_processes"),
    "trainer.epochs": ("num_epochs", "num_train_epochs", "max_epochs"),
    "trainer.eval_every": ("eval_steps", "val_check_interval"),
    "trainer.precision": ("fp16", "bf16", "dtype"),
    "trainer.save_every": ("save_steps",),
    "trainer.log_every": ("logging_steps", "log_every_n_steps"),
}
"""Names of a setting in other trainers and in the official code."""
_ABSENT = {
    "weight_decay": "AdamW has no weight decay here, as in the official code",
    "warmup_steps": "the learning rate has no warm-up, as in the official code",
    "warmup_ratio": "the learning rate has no warm-up, as in the official code",
    "gradient_accumulation_steps": "data.batch_size is the full batch of a step; trainer.chunk_tokens limits its memory",
}


def _nearest_keys(key: str, keys: Mapping[str, Sequence[str]]) -> list[str]:
    """Return the settings closest to an unknown key: first by name without the config group, then by the whole key."""
    part, _, name = key.rpartition(".")
    every = [known for group in keys.values() for known in group]
    names = {known: known.rpartition(".")[2] for known in every}
    if same := [known for known in every if names[known] == name]:  # without its config group, or with another one
        return same[:3]
    if other := [known for known, others in _OTHER_NAMES.items() if name.lower().replace("-", "_") in others]:
        return other
    for candidates in (keys.get(part, ()) if part else (), every):
        close = difflib.get_close_matches(name, [names[known] for known in candidates], n=2, cutoff=0.7)
        if close:
            return [known for known in candidates if names[known] in close][:3]
    return difflib.get_close_matches(key, every, n=3, cutoff=0.6)


def unknown_key(key: str) -> ConfigError:
    """Return the error for a dotted key that the schema does not have, with the nearest ones."""
    keys, key = setting_keys() | setting_keys(SweepConfig, "sweep"), key[:100]
    part, _, name = key.rpartition(".")
    if name in _ABSENT:
        return ConfigError(f"{key} is not a setting: {_ABSENT[name]}. Try: leave it out")
    near = _nearest_keys(key, keys)
    meant = f" Did you mean {' or '.join(near)}?" if near else ""
    if part and part in keys:
        return ConfigError(f"{key} is not a setting.{meant} Allowed under {part}: {', '.join(keys[part])}")
    return ConfigError(f"{key} is not a setting.{meant} Allowed: {', '.join([*sorted(filter(None, keys)), *keys['']])}")


def check_overrides(arguments: Sequence[str], groups: Mapping[str, Sequence[str]]) -> None:
    """Refuse `key=value` arguments that name no setting, no group of conf/ or no choice of it, before Hydra composes anything.

    Args:
        arguments: The command line.
        groups: Groups of conf/, and the choices of each.

    Raises:
        ConfigError: With the nearest keys or choices.
    """
    parts = setting_keys() | setting_keys(SweepConfig, "sweep")
    every = {known for keys in parts.values() for known in keys} | set(parts)
    for argument in arguments:
        key, equals, value = argument.partition("=")
        if re.search(r"\d{1000}", value):  # Hydra would stumble over it
            raise ConfigError(f"{key[:100]} is a number of over a thousand digits. Try: python run.py --help")
        key = key.lstrip("+~").partition("@")[0]
        part = key.split(".")[0].split("/")[0]
        is_choice = part in groups and "." not in key
        if argument.startswith("-") or not equals or is_choice or part == "hydra":
            if not argument.startswith("-") and equals and groups.get(key):
                _check_choice(key, value, groups[key])
            continue
        if key not in every:
            raise unknown_key(key)


def _check_choice(group: str, value: str, choices: Sequence[str]) -> None:
    """Refuse a name, or one of a sweep's names, that a group of conf/ does not have; Hydra's own syntax is left to Hydra."""
    for choice in value.split(","):
        name = choice.strip().removesuffix(".yaml")[:100]
        if re.fullmatch(r"[\w.-]+", name) and name not in (*choices, "null"):
            near = difflib.get_close_matches(name, choices, n=3)
            meant = f" Did you mean {' or '.join(f'{group}={one}' for one in near)}?" if near else ""
            raise ConfigError(f"{group}={name} is not a choice.{meant} Allowed: {', '.join(choices)}")


def _build(schema: type, raw: object, prefix: str) -> Any:  # noqa: ANN401  (an instance of schema)
    if not isinstance(raw, dict):
        raise ConfigError(f"{prefix or 'the config'} must hold settings, got {_shown(raw)}")
    hints = get_type_hints(schema)
    for name in raw:
        if name not in hints:
            text = name if isinstance(name, str) else _shown(name)
            raise unknown_key(f"{prefix}.{text}" if prefix else text)
    values = {}
    for item in dataclasses.fields(schema):
        key = f"{prefix}.{item.name}" if prefix else item.name
        hint = hints[item.name]
        if item.name in raw:
            values[item.name] = _convert(hint, raw[item.name], key, item.default)
        elif dataclasses.is_dataclass(hint) and _all_default(hint):
            values[item.name] = hint()  # type: ignore[operator]
        elif item.default is dataclasses.MISSING and item.default_factory is dataclasses.MISSING:
            raise ConfigError(f"{key} is not set. It must be {_describe(hint)}")
    return schema(**values)


def _all_default(schema: Any) -> bool:  # noqa: ANN401
    return all(
        item.default is not dataclasses.MISSING or item.default_factory is not dataclasses.MISSING
        for item in dataclasses.fields(schema)
    )


def _convert(hint: Any, value: object, key: str, default: object = None) -> Any:  # noqa: ANN401
    """Return `value` as the type `hint`, without guessing: only an integer counts as a float, nothing as a string."""
    if dataclasses.is_dataclass(hint):
        return _build(hint, value, key)  # type: ignore[arg-type]
    origin = get_origin(hint)
    if origin in (Union, types.UnionType):
        if value is None and types.NoneType in get_args(hint):
            return None
        for option in get_args(hint):
            if option is types.NoneType:
                continue
            try:
                return _convert(option, value, key)
            except ConfigError:
                if option is str and isinstance(value, str):
                    raise
    elif origin is list and isinstance(value, list):
        (item,) = get_args(hint)
        with suppress(ConfigError):
            return [_convert(item, entry, key) for entry in value]
    elif origin is Literal and isinstance(value, str) and value in get_args(hint):
        return value
    elif hint is float and type(value) in (int, float):
        with suppress(OverflowError):
            return float(value)  # type: ignore[arg-type]
    elif hint is str and isinstance(value, str):
        return _checked_text(value, key)
    elif hint is not float and type(value) is hint:
        return value
    raise ConfigError(
        f"{key} must be {_describe(hint)}, got {_shown(value)}. Try: {_command(key)} {_example(hint, value, key, default)}"
    )


def _checked_text(value: str, key: str) -> str:
    """Refuse text that no file can be called and no file can hold."""
    try:
        longest = max(len(part.encode()) for part in value.split("/"))
    except UnicodeEncodeError:
        raise ConfigError(f"{key} holds a lone surrogate, which is not text: {_shown(value)}") from None
    if "\0" in value or longest > _LONGEST_PART or len(value.encode()) > _LONGEST:
        raise ConfigError(
            f"{key} must be text of at most {_LONGEST} bytes, {_LONGEST_PART} between two slashes, and without NUL characters, "
            f"got {len(value)} characters: {_shown(value)}. Try: a shorter name"
        )
    return value


def _example(hint: Any, value: object, key: str, default: object) -> str:  # noqa: ANN401
    """Return what to type in place of a value of the wrong type."""
    if get_origin(hint) in (Union, types.UnionType):
        hint = next(option for option in get_args(hint) if option is not types.NoneType)
    entries = value if isinstance(value, list) and value else [value]
    if get_origin(hint) is list:
        (item,) = get_args(hint)
        return f"'{key}=[{','.join(_example_text(item, entry) for entry in entries[:5])}]'"
    if hint is str:
        return f"'{key}={_example_text(hint, value)}'"
    if get_origin(hint) is Literal:
        return f"{key}={_example_text(hint, value)}"
    if default is None or default is dataclasses.MISSING:
        default = {int: 100, float: 0.1, bool: True}[hint]
    return f"{key}={str(default).lower()}"


def _example_text(hint: Any, value: object) -> str:  # noqa: ANN401
    """Return a choice or text near to `value`; a number that shall be text needs quotes to pass Hydra."""
    if get_origin(hint) is Literal:
        choices = get_args(hint)
        return str((difflib.get_close_matches(_shown(value)[:60].strip("'"), choices, n=1) or choices)[0])
    if isinstance(value, str):
        return value[:60]
    return f'"{_shown(value).lower()}"' if isinstance(value, bool | int | float) else "TEXT"


def _describe(hint: Any) -> str:  # noqa: ANN401
    names = {int: "an integer", float: "a number", str: "text", bool: "true or false", types.NoneType: "null"}
    origin, args = get_origin(hint), get_args(hint)
    if origin is Literal:
        return f"one of {', '.join(map(str, args))}"
    if origin in (Union, types.UnionType):
        return " or ".join(_describe(arg) for arg in args)
    if origin is list:
        return f"a list (like [a,b]) whose entries are {_describe(args[0])}"
    if dataclasses.is_dataclass(hint):
        return f"settings ({', '.join(item.name for item in dataclasses.fields(hint))})"
    return names[hint]
