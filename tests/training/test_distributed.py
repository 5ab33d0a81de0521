"""Loss and gradient of 2 and 3 real processes equal those of one process; ranks from the environment; rejected settings."""

import multiprocessing as mp
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from support.encoders import NO_DROPOUT, small_backbone, small_tokenizer
from support.processes import PROCESSES, end
from support.runs import small_config

from promcse_pl.config import DataConfig, LossConfig, OptimConfig, TrainerConfig
from promcse_pl.data.batch import TrainBatch
from promcse_pl.data.module import PromcseDataModule
from promcse_pl.models.encoder import PromptEncoder
from promcse_pl.models.mlm import MlmHead
from promcse_pl.models.tuning import Tuning
from promcse_pl.training.distributed import Ranks, find_ranks, refuse_sweep
from promcse_pl.training.gather import average_gradients
from promcse_pl.training.module import PromcseModule
from promcse_pl.utils.errors import ConfigError

TOLERANCE = {torch.float32: (1e-6, 1e-5), torch.float64: (1e-12, 4e-12)}
"""Of losses and of gradients. Rounding in float32 depends on the processor's kernels: up to 4.1e-6 with AVX-512 on AMD, below
4e-6 on others; float64 is what proves the equality."""
TUNINGS = {"lora": Tuning("lora", 3, 6.0), "full": Tuning("full")}
JOBS = [
    (width, mlm, rows, ranks, dtype, chunk_tokens, official, term)
    for ranks in (2, 3)
    for dtype in TOLERANCE
    for width, mlm, rows, chunk_tokens, official, term in [
        (3, False, 8, None, False, ""),
        (3, True, 7, 30, False, ""),
        (2, True, 5, 30, False, ""),
        (1, False, 3, 30, False, ""),
        (3, True, 2, 30, False, ""),  # of three ranks one has no row
        (3, True, 1, None, False, ""),  # and here all but one
        (2, False, 7, 30, True, ""),
        (2, False, 7, 30, False, "scores"),
        (2, False, 2, None, False, "scores"),
    ]
    if dtype is torch.float64
    or term != "scores"  # CoSENT magnifies the rounding of nearly equal cosines by 1/temperature
]
JOBS += [(3, False, rows, 2, torch.float64, 30, False, tuned) for rows in (1, 8) for tuned in TUNINGS]


def make_module(
    width: int, mlm: bool, dtype: torch.dtype, chunk_tokens: int | None, official: bool, term: str
) -> PromcseModule:
    backbone = small_backbone(**NO_DROPOUT)
    torch.manual_seed(3)
    backbone.tune(TUNINGS.get(term, Tuning()))
    encoder = PromptEncoder(backbone, length=4, head="mlp")
    head = MlmHead(backbone.word_embeddings, layer_norm_eps=1e-12) if mlm else None
    loss = LossConfig(
        hinge_weight=10.0 if width == 3 else 0.0,
        hard_negative_logit=0.3 if width == 3 else 0.0,
        mlm_weight=0.1 * mlm,
    )
    module = PromcseModule(
        encoder,
        loss=loss,
        optim=OptimConfig(),
        total_steps=1,
        chunk_tokens=chunk_tokens,
        mlm_head=head,
        official_gradient=official,
    )
    return module.to(dtype).train()


def whole_batch(folder: Path, width: int, mlm: bool, rows: int, term: str = "") -> TrainBatch:
    """A ragged last batch of an epoch; the row count is the data's."""
    path = folder / f"{width}-{rows}-{term}.csv"
    if not path.exists():
        cells = [
            [f"w{5 + row} w{6 + position}" + " w20" * (row % 4) for position in range(width)] for row in range(rows)
        ]
        names = ["a", "b", "c"][:width]
        if term == "scores":
            names, cells = [*names, "score"], [[*row, str(number % 5)] for number, row in enumerate(cells)]
        path.write_text("\n".join(",".join(row) for row in [names, *cells]) + "\n")
    kind = "scored_pairs" if term == "scores" else {1: "sentences", 2: "pairs", 3: "triplets"}[width]
    config = DataConfig(
        kind=kind, train=str(path), batch_size=20, max_length=12, cache_dir=str(folder / "cache"), header=True
    )
    data = PromcseDataModule(config, small_tokenizer(), longest_input=36, seed=0, mlm=mlm)
    data.setup()
    (batch,) = data.train_dataloader()
    return batch


def step(module: PromcseModule, batch: TrainBatch) -> dict[str, torch.Tensor]:
    parts = module.losses(batch)
    parts.total.backward()
    average_gradients(module._trained())
    gradients = {f"gradient {name}": p.grad for name, p in module.named_parameters() if p.requires_grad}
    return {**{name: part.detach() for name, part in parts.named().items()}, **gradients}


def run_rank(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    for number, (width, mlm, rows, ranks, dtype, chunk_tokens, official, term) in enumerate(JOBS):
        if rank < ranks:
            dist.init_process_group("gloo", init_method=f"file://{folder}/store{number}", rank=rank, world_size=ranks)
            share = whole_batch(folder, width, mlm, rows, term).for_rank(rank, ranks)
            module = make_module(width, mlm, dtype, chunk_tokens, official, term)
            torch.save(step(module, share), folder / f"{number}-{rank}")
            dist.destroy_process_group()


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """What every rank has computed for every job; the processes start once."""
    folder = tmp_path_factory.mktemp("ranks")
    for width, mlm, rows, *_, term in JOBS:
        whole_batch(folder, width, mlm, rows, term)
    processes: list[mp.Process] = [PROCESSES.Process(target=run_rank, args=(rank, folder)) for rank in range(3)]
    for process in processes:
        process.start()
    assert [end(process) for process in processes] == [0, 0, 0]
    return folder


def name_of(job: tuple) -> str:
    width, mlm, rows, ranks, dtype, _, official, term = job
    return f"{ranks} ranks-{rows} rows of {width}{'-mlm' * mlm}{f'-{term}' * bool(term)}{'-official' * official}-{str(dtype)[6:]}"


@pytest.mark.parametrize("job", JOBS, ids=name_of)
def test_loss_and_gradient_are_those_of_one_process(job, folder):
    width, mlm, rows, ranks, dtype, chunk_tokens, official, term = job
    module = make_module(width, mlm, dtype, chunk_tokens, official, term)
    alone = step(module, whole_batch(folder, width, mlm, rows, term))
    scale = ranks if official else 1
    for rank in range(ranks):
        found = torch.load(folder / f"{JOBS.index(job)}-{rank}")
        assert set(found) == set(alone)
        for name, expected in alone.items():
            is_gradient = name.startswith("gradient")
            size = max(float(expected.abs().max()), 1e-3)
            error = float((found[name] * (scale if is_gradient else 1) - expected).abs().max()) / size
            assert error <= TOLERANCE[dtype][is_gradient], f"{name}: {error:.1e}"
    if rows > 1:
        assert float(alone["gradient encoder.prompt.embedding.weight"].abs().max()) > 1e-3


@pytest.mark.parametrize("rows", [1, 2, 3, 7, 8])
@pytest.mark.parametrize("ranks", [1, 2, 3, 5])
def test_the_shares_of_a_batch_hold_every_row_of_every_view_once(rows, ranks, tmp_path):
    batch = whole_batch(tmp_path, 3, True, rows)
    shares = [batch.for_rank(rank, ranks) for rank in range(ranks)]
    assert torch.cat([share.rows_B for share in shares]).tolist() == batch.rows_B.tolist()
    assert max(len(share.rows_B) for share in shares) - min(len(share.rows_B) for share in shares) <= 1
    whole = [(ids[mask.bool()], labels) for ids, mask, labels in sentences(batch)]
    parts = [
        [(ids[mask.bool()], labels) for ids, mask, labels in sentences(share)] for share in shares if len(share.rows_B)
    ]
    by_view = [part[view * len(part) // 3 : (view + 1) * len(part) // 3] for view in range(3) for part in parts]
    again = [sentence for part in by_view for sentence in part]
    assert len(again) == len(whole)
    for (ids, labels), (expected_ids, expected_labels) in zip(again, whole, strict=True):
        assert torch.equal(ids, expected_ids)
        assert torch.equal(labels, expected_labels[: len(labels)])


def sentences(batch: TrainBatch) -> zip:
    return zip(batch.tokens.ids_NT, batch.tokens.mask_NT, batch.tokens.mlm_labels_NT, strict=True)


def trainer(devices: int = 1, num_nodes: int = 1) -> TrainerConfig:
    return TrainerConfig(devices=devices, num_nodes=num_nodes)


NAMES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID")
LOCAL_SIZES = ("LOCAL_WORLD_SIZE", "SLURM_NTASKS_PER_NODE")


@pytest.fixture
def environment(monkeypatch):
    """Set the environment variables of torchrun or srun."""
    for name in (*NAMES, *LOCAL_SIZES):
        monkeypatch.delenv(name, raising=False)

    def say(starter: str, rank: int, size: int, local: int) -> None:
        names = NAMES[:3] if starter == "torchrun" else NAMES[3:]
        for name, value in zip(names, (rank, size, local), strict=True):
            monkeypatch.setenv(name, str(value))

    return say


@pytest.mark.usefixtures("environment")
def test_a_process_without_a_launcher_runs_alone_or_must_start_the_ranks():
    assert find_ranks(trainer()) == Ranks(0, 1, 1)
    assert find_ranks(trainer(2)) is None
    with pytest.raises(
        ConfigError, match=r"trainer\.num_nodes=2 needs a launcher.*Try: torchrun --nnodes=2 --nproc-per"
    ):
        find_ranks(trainer(4, 2))
    refuse_sweep()


@pytest.mark.parametrize("starter", ["torchrun", "srun"])
def test_the_rank_that_torchrun_or_slurm_set_is_used(starter, environment, monkeypatch):
    environment(starter, 6, 8, 2)
    ranks = find_ranks(trainer(4, 2))
    assert (ranks, ranks.local) == (Ranks(6, 8, 4), 2)
    with pytest.raises(
        ConfigError, match=rf"{starter} started 8 processes, but trainer.devices=4 x trainer.num_nodes=1 "
    ):
        find_ranks(trainer(4, 1))
    monkeypatch.setenv({"torchrun": "LOCAL_WORLD_SIZE", "srun": "SLURM_NTASKS_PER_NODE"}[starter], "2")
    with pytest.raises(ConfigError, match=r"started 8 .* Try: trainer=ddp trainer\.devices=2 trainer\.num_nodes=4$"):
        find_ranks(trainer(2, 1))
    environment(starter, 6, 8, 0)
    with pytest.raises(
        ConfigError, match=r"has local rank 0, .* Try: trainer=ddp trainer\.devices=2 trainer\.num_nodes=4,"
    ):
        find_ranks(trainer(4, 2))
    with pytest.raises(ConfigError, match=rf"{starter} started 8 processes, and each would run the whole sweep"):
        refuse_sweep()


def test_ranks_that_are_not_machine_by_machine_are_refused(environment):
    environment("srun", 6, 8, 3)
    with pytest.raises(ConfigError, match=r"process 6 of 8 has local rank 3, but .*--distribution=block"):
        find_ranks(trainer(4, 2))


def test_tasks_of_a_job_step_may_be_runs_of_their_own_but_processes_of_torchrun_may_not(environment):
    environment("srun", 3, 4, 3)
    assert find_ranks(trainer()) == Ranks()
    environment("torchrun", 3, 4, 3)
    with pytest.raises(ConfigError, match=r"Try: trainer=ddp trainer\.devices=4"):
        find_ranks(trainer())


def test_processes_that_an_apple_gpu_or_a_batch_cannot_serve_are_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"trainer\.device=mps trains in one process. Try: trainer\.devices=1"):
        TrainerConfig(devices=2, device="mps")
    with pytest.raises(
        ConfigError, match=r"data\.batch_size=4 rows cannot be split among 5 processes .*Try: data\.batch_size=5"
    ):
        small_config(tmp_path, trainer={"devices": 5})
