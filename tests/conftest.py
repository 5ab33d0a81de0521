"""Shared fixtures: folders from the environment, small encoders made in memory."""

import io
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from rich.console import Console
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import AutoConfig, AutoModel, PreTrainedTokenizerFast

from promcse_pl.config import Config
from promcse_pl.data.batch import Tokens
from promcse_pl.data.demo import demo_pairs
from promcse_pl.models.backbone import FrozenBackbone
from promcse_pl.models.identity import EncoderId
from promcse_pl.runs.lifecycle import run_job

ROOT = Path(__file__).resolve().parents[1]
WHOLE_GOLDEN, SOME_GOLDEN = ROOT / "../shared/golden", ROOT / "tests/golden/numbers"
GOLDEN = Path(os.environ.get("PROMCSE_GOLDEN", WHOLE_GOLDEN if WHOLE_GOLDEN.is_dir() else SOME_GOLDEN)).resolve()
DATA = Path(os.environ.get("PROMCSE_DATA", ROOT / "../shared/data")).resolve()

torch.set_num_threads(1)  # the encoders are so small that on a busy machine threads cost more than they bring

SMALL = {
    "vocab_size": 97,
    "hidden_size": 16,
    "num_attention_heads": 2,
    "num_hidden_layers": 3,
    "intermediate_size": 24,
    "max_position_embeddings": 40,
    "pad_token_id": 0,
    "initializer_range": 0.2,  # with the usual 0.02 so small an encoder hardly attends to anything
}
FAMILIES: dict[str, dict[str, object]] = {
    "bert": {},
    "roberta": {"pad_token_id": 1},
    "xlm-roberta": {"pad_token_id": 1},
    "electra": {"embedding_size": 12},
    # a window narrower than a sentence; the default special tokens lie outside so small a vocabulary
    "modernbert": {
        "local_attention": 6,
        **dict.fromkeys(("bos_token_id", "cls_token_id", "eos_token_id", "sep_token_id"), 2),
    },
}
"""What each supported family needs beside SMALL."""
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


def small_encoder(family: str, **changes: object) -> torch.nn.Module:
    torch.manual_seed(1)
    return AutoModel.from_config(AutoConfig.for_model(family, **{**SMALL, **FAMILIES.get(family, {}), **changes}))


def small_backbone(family: str = "bert", **changes: object) -> FrozenBackbone:
    return FrozenBackbone(small_encoder(family, **changes), EncoderId(f"small-{family}", None, "0" * 64))


def small_tokens(lengths: list[int], pad_id: int = 0) -> Tokens:
    """Random sentences of the given lengths, padded to the longest."""
    lengths_N = torch.tensor(lengths)
    mask_NT = (torch.arange(max(lengths)) < lengths_N.unsqueeze(1)).long()
    ids_NT = torch.randint(5, SMALL["vocab_size"], mask_NT.shape, generator=torch.Generator().manual_seed(2))
    return Tokens(torch.where(mask_NT.bool(), ids_NT, pad_id), mask_NT)


def small_tokenizer(pad_id: int = 0) -> PreTrainedTokenizerFast:
    """Words w5, w6, ... by their number; [CLS] and [SEP] around them."""
    words = ["[PAD]", "[UNK]"] if pad_id == 0 else ["[UNK]", "[PAD]"]
    words += ["[CLS]", "[SEP]", "[MASK]", *(f"w{i}" for i in range(5, SMALL["vocab_size"]))]
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    backend.normalizer = normalizers.Lowercase()
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.post_processor = processors.TemplateProcessing(
        "[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    names = {f"{name}_token": f"[{name.upper()}]" for name in ("pad", "unk", "cls", "sep", "mask")}
    return PreTrainedTokenizerFast(tokenizer_object=backend, **names)


def save_small_encoder(folder: Path, family: str = "bert", **changes: object) -> Path:
    """Write a small encoder and its tokenizer as transformers does; returns the folder."""
    model = small_encoder(family, **changes)
    model.save_pretrained(folder)
    small_tokenizer(model.config.pad_token_id).save_pretrained(folder)
    return folder


@contextmanager
def memory_limit(more: int = 300_000_000, seconds: int = 30) -> Iterator[None]:
    """Refuse this process more memory than it has and `more` bytes; raise TimeoutError in what waits longer than `seconds`."""
    resource = pytest.importorskip("resource")
    statm = Path("/proc/self/statm")
    if not statm.exists():
        pytest.skip("reads /proc")

    def stop(*_: object) -> None:
        raise TimeoutError(f"it takes more than {seconds} s")

    used = int(statm.read_text().split()[0]) * resource.getpagesize()
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    handler = signal.signal(signal.SIGALRM, stop)
    resource.setrlimit(resource.RLIMIT_AS, (used + more, hard))
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, handler)
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


@pytest.fixture
def backbone() -> FrozenBackbone:
    return small_backbone()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if "realdata" in item.keywords and not DATA.is_dir():
            item.add_marker(pytest.mark.skip(reason=f"no data in {DATA}; set PROMCSE_DATA"))
        if "gpu" in item.keywords and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))
        if "golden" in item.keywords and not GOLDEN.is_dir():
            item.add_marker(pytest.mark.skip(reason=f"no golden numbers in {GOLDEN}; set PROMCSE_GOLDEN"))


SECRETS = {"MY_SECRET": "hunter2-of-the-environment", "WANDB_API_KEY": "c0ffee" * 6 + "beef"}
"""Planted in the environment of the trained run; none of them may reach a file."""
DEV_PAIRS = 40


@dataclass(frozen=True)
class Run:
    """A finished run and what it printed."""

    folder: Path
    config: Config
    results: dict[str, object]
    output: str


@pytest.fixture(scope="session")
def trained_run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """One short training of MiniLM on demo triplets, tracked offline, with secrets around; shared by many tests."""
    base = tmp_path_factory.mktemp("trained")
    rows = demo_pairs("dev")[:DEV_PAIRS]
    (base / "dev.tsv").write_text(
        "a\tb\tscore\n" + "".join(f"{a}\t{b}\t{score}\n" for a, b, score in rows), encoding="utf-8"
    )
    config = Config.from_dict(
        {
            "model": {"path": "sentence-transformers/all-MiniLM-L6-v2", "pooling": "avg", "head": "none"},
            "data": {
                "kind": "triplets",
                "train": "demo",
                "dev": str(base / "dev.tsv"),
                "max_rows": 30,
                "batch_size": 8,
                "cache_dir": str(base / "cache"),
            },
            "optim": {"lr": 0.1},
            "trainer": {
                "epochs": 2,
                "max_steps": 7,
                "eval_every": 2,
                "log_every": 1,
                "precision": "float32",
                "device": "cpu",
                "chunk_tokens": 512,
            },
            "tracking": {"wandb": "offline", "project": "test", "name": "shared", "tags": ["short"]},
        }
    )
    printed = io.StringIO()
    with pytest.MonkeyPatch.context() as patch:
        for name, value in SECRETS.items():
            patch.setenv(name, value)
        patch.setenv("XDG_CACHE_HOME", str(base / "xdg"))
        patch.setenv("HF_HUB_OFFLINE", "1")
        patch.delenv("WANDB_MODE", raising=False)
        results = run_job(config, base / "run", Console(file=printed, width=100))
    return Run(base / "run", config, results, printed.getvalue())
