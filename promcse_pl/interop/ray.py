"""Encode with Ray: an actor for Ray Data, and the engine of `promcse encode --engine ray`."""

# N sentences, D width

from __future__ import annotations

import dataclasses
import difflib
import os
import time
from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from promcse_pl.corpus.encode import (
    CorpusPlan,
    CorpusProgress,
    EncodedCorpus,
    ProgressCallback,
    corpus_settings,
    encode_task,
    fixed_size_lists,
    input_bytes,
)
from promcse_pl.corpus.folder import check_settings, matching_shards
from promcse_pl.corpus.rows import EMBEDDING
from promcse_pl.embedder import PromCSE
from promcse_pl.models.encoder_files import first_line
from promcse_pl.models.vectors import Vectors
from promcse_pl.utils.errors import ConfigError, DataError, PromcseError
from promcse_pl.utils.paths import expand
from promcse_pl.utils.ray_cluster import cluster_nodes

try:
    import ray
    from ray.exceptions import (
        NodeDiedError,
        OutOfMemoryError,
        RayActorError,
        RayError,
        RayTaskError,
        WorkerCrashedError,
    )
    from ray.util.queue import Queue
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy
except ImportError as error:
    raise ConfigError("this needs Ray. Try: pip install 'promcse_pl[ray]'") from error

if TYPE_CHECKING:
    import pyarrow as pa

PARTS_PER_WORKER = 8
"""Maximum number of parts per worker. Smaller parts reduce the delay by a slow or lost worker."""
RETRIES = 3
"""Maximum number of retries of a part whose worker was killed. Errors of the encoder or of a row are not retried."""
LOST_WORKER = (RayActorError, WorkerCrashedError, NodeDiedError, OutOfMemoryError)
"""Errors of a killed worker. Ray does not retry its part: Ray would retry without limit if its memory monitor killed it."""
_POLL_SECONDS = 0.2
_STOP_SECONDS = 30.0


def _load_in_actor(adapter: str, encoder: str | None, dtype: str) -> PromCSE:
    """Load an adapter on the GPU, and set the number of threads to the CPUs, that Ray assigned to this actor."""
    cpus = max(1, int(ray.get_runtime_context().get_assigned_resources().get("CPU", 1)))
    os.environ["RAYON_NUM_THREADS"] = str(cpus)  # threads of the tokenizer, read before its first batch
    torch.set_num_threads(cpus)
    device = "cuda" if ray.get_gpu_ids() else "cpu"
    return PromCSE.from_pretrained(adapter, encoder=encoder, device=device, dtype=dtype)


class RayEncoder:
    """Actor for `ray.data.Dataset.map_batches` that adds the column `embedding` and keeps all others.

    Each actor loads the adapter once, on its GPU if Ray assigned one, and uses as many threads as it has CPUs (`num_cpus`, 1 by
    default). Set the number of actors with `compute`; `concurrency` is deprecated in Ray. With `num_gpus`, Ray requires a
    `batch_size`: use a multiple of 4,096, the number of texts that `PromCSE.encode` sorts by length at a time. Use
    `batch_format="pyarrow"` if other columns contain lists or missing integers: Ray converts such columns in its default format,
    numpy.

    Args:
        adapter: Folder of an adapter or of a run, readable by every node, or a hub id.
        text_column: Name of the text column.
        encoder, dtype: See `PromCSE.load`.
        prompt_name, prompt: See `PromCSE.encode`.

    Examples:
        >>> texts = ray.data.read_parquet("corpus")  # doctest: +SKIP
        >>> texts.map_batches(
        ...     RayEncoder,
        ...     fn_constructor_kwargs={"adapter": "/shared/adapter", "text_column": "text"},
        ...     compute=ray.data.ActorPoolStrategy(size=8),
        ...     batch_size=16384,
        ...     batch_format="pyarrow",
        ...     num_cpus=8,
        ...     num_gpus=1,
        ... ).write_parquet("embeddings")  # doctest: +SKIP
    """

    def __init__(
        self,
        adapter: str | Path,
        *,
        text_column: str = "text",
        encoder: str | Path | None = None,
        dtype: str = "float32",
        prompt_name: str | None = None,
        prompt: str | None = None,
    ) -> None:
        encoder = None if encoder is None else _on_every_node(encoder)
        self._model = _load_in_actor(_on_every_node(adapter), encoder, dtype)
        self._text_column, self._prompt_name, self._prompt = text_column, prompt_name, prompt

    def __call__(self, batch: dict[str, Any] | pa.Table) -> dict[str, Any] | pa.Table:
        """Return a batch with the embeddings of its texts.

        Args:
            batch: Columns as numpy arrays or as a pyarrow table.

        Returns:
            The same kind of batch with `embedding`: (N, D) float32 of unit length, or a column of fixed-size lists.

        Raises:
            ConfigError: There is no text column of that name, or the batch has another format.
            DataError: There is a column `embedding`, or a text is missing.
        """
        if isinstance(batch, dict):
            self._check_columns(list(batch))
            return {**batch, EMBEDDING: self._embeddings(batch[self._text_column].tolist())}
        if not hasattr(batch, "column_names"):
            raise ConfigError(
                f"a batch must be numpy arrays or a pyarrow table, got {type(batch)}. Try: batch_format='numpy'"
            )
        self._check_columns(batch.column_names)
        embeddings_ND = self._embeddings(batch[self._text_column].to_pylist())
        return batch.append_column(EMBEDDING, fixed_size_lists(embeddings_ND))

    def _embeddings(self, texts: list[str]) -> Vectors:
        return self._model.encode(texts, prompt_name=self._prompt_name, prompt=self._prompt)

    def _check_columns(self, names: Sequence[str]) -> None:
        if self._text_column not in names:
            near = difflib.get_close_matches(self._text_column, names, n=1) or names[:1]
            raise ConfigError(
                f"text_column={self._text_column!r} is not a column of the dataset (columns: {', '.join(names)}). "
                f"Try: text_column={''.join(near)!r}"
            )
        if EMBEDDING in names:
            raise DataError(
                f"the dataset has a column {EMBEDDING}, the name of the output column. Try: "
                f'dataset.rename_columns({{"{EMBEDDING}": "old_{EMBEDDING}"}})'
            )


@dataclass(frozen=True, slots=True)
class RayCorpusEngine:
    """Engine of `encode_corpus` that encodes parts of a corpus in the workers of the Ray cluster of this process.

    Parts are those of `CorpusOptions.task`: whole files, or shards if there are fewer files than workers. The part of a killed
    worker is retried in a new one, which skips finished shards.

    Every node must be able to read the adapter and the inputs and to write to the output folder under the same paths.

    Attributes:
        adapter: Folder of an adapter or of a run, or a hub id. It must be the model of `encode_corpus`.
        encoder, dtype: See `PromCSE.load`.
        device: `cpu`, `cuda`, or `auto`: GPUs if the cluster has any.
        workers: Number of worker processes; None: one per GPU or, without GPUs, one per node. All have the same number of CPUs.

    Examples:
        >>> encode_corpus(model, ["corpus"], "embeddings", engine=RayCorpusEngine("/shared/adapter"))  # doctest: +SKIP
    """

    adapter: str | Path
    encoder: str | Path | None = None
    dtype: str = "float32"
    device: str = "auto"
    workers: int | None = None

    def __post_init__(self) -> None:
        if self.device not in ("auto", "cpu", "cuda"):
            raise ConfigError(f"device must be auto, cpu or cuda with Ray, got {self.device!r}")
        if self.workers is not None and self.workers < 1:
            raise ConfigError(f"workers must be an integer >= 1, got {self.workers!r}")

    def __call__(self, plan: CorpusPlan, report: ProgressCallback | None) -> EncodedCorpus:
        """Encode the shards of a plan that are not finished.

        Raises:
            ConfigError: The cluster has too few CPUs or GPUs, or the plan has a task.
            PromcseError: The worker of a part was killed more than `RETRIES` times, or a worker raised an error.
        """
        if plan.options.task != (0, 1):
            raise ConfigError("task has no effect with RayCorpusEngine, which distributes all parts. Try: task=(0, 1)")
        files = [dataclasses.replace(file, path=file.path.absolute()) for file in plan.files]
        plan = dataclasses.replace(plan, files=files, out=plan.out.absolute())
        earlier = {shard.name for shard in matching_shards(plan.out, plan.settings)}
        try:
            self._encode_parts(plan, worker_resources(cluster_nodes(ray), self.workers, self.device), report)
        except RayTaskError as error:
            if isinstance(error.cause, PromcseError | OSError):
                raise error.cause from None
            raise
        except RayError as error:
            raise PromcseError(
                f"Ray could not finish a part of the corpus ({type(error).__name__}: {first_line(error)}). Finished shards are "
                "kept. Try: the same command again, with fewer --workers if a worker ran out of memory"
            ) from error
        names = {file.name for file in files}
        shards = [shard for shard in matching_shards(plan.out, plan.settings) if shard.input in names]
        new = [shard for shard in shards if shard.name not in earlier]
        rows, bad_rows = sum(shard.rows for shard in new), sum(shard.bad_rows for shard in new)
        return EncodedCorpus(len(new), rows, bad_rows, len(shards) - len(new))

    def _encode_parts(self, plan: CorpusPlan, resources: WorkerResources, report: ProgressCallback | None) -> None:
        parts = max(resources.workers, min(len(plan.files), PARTS_PER_WORKER * resources.workers))
        shared, progress = ray.put(plan), _Progress(plan, report)
        waiting, losses = deque(range(parts)), Counter[int]()
        idle: list[ray.actor.ActorHandle] = []
        running: dict[ray.ObjectRef, tuple[ray.actor.ActorHandle, int]] = {}
        try:
            while waiting or running:
                while waiting and len(running) < resources.workers:
                    worker, part = idle.pop() if idle else self._start_worker(resources), waiting.popleft()
                    running[worker.encode.remote(shared, (part, parts), progress.queue)] = worker, part
                while idle:  # without waiting parts: its CPUs may be needed to replace a killed worker
                    ray.kill(idle.pop())
                done, _ = ray.wait(list(running), timeout=_POLL_SECONDS)
                progress.forward()
                for answer in done:
                    worker, part = running.pop(answer)
                    try:
                        ray.get(answer)
                        idle.append(worker)
                    except LOST_WORKER:
                        ray.kill(worker)
                        losses[part] += 1
                        if losses[part] > RETRIES:
                            raise
                        waiting.append(part)
        finally:
            progress.queue.shutdown()  # workers that report progress to it stop and remove their temporary files
            for answer in running:
                ray.cancel(answer)  # if it has not started
            if running:
                ray.wait(list(running), num_returns=len(running), timeout=_STOP_SECONDS)
            for worker, _ in running.values():
                ray.kill(worker)

    def _start_worker(self, resources: WorkerResources) -> ray.actor.ActorHandle:
        adapter, encoder = _on_every_node(self.adapter), self.encoder and _on_every_node(self.encoder)
        actor = ray.remote(CorpusWorker).options(num_cpus=resources.cpus, num_gpus=resources.gpus)
        return actor.remote(adapter, encoder, self.dtype)


class CorpusWorker:
    """Actor that encodes parts of a corpus with an adapter that it loads once.

    Args:
        adapter, encoder, dtype: See `RayCorpusEngine`.
    """

    def __init__(self, adapter: str, encoder: str | None, dtype: str) -> None:
        self._arguments = adapter, encoder, dtype

    @cached_property
    def _model(self) -> PromCSE:
        return _load_in_actor(*self._arguments)  # not in __init__: Ray would replace its error by an ActorDiedError

    def encode(self, plan: CorpusPlan, task: tuple[int, int], reports: Queue) -> None:
        """Encode a part of a corpus and put its progress into a queue."""
        plan = dataclasses.replace(plan, options=dataclasses.replace(plan.options, task=task))
        # on this node, the path may contain another adapter
        check_settings(plan.out, corpus_settings(self._model, plan.options))
        encode_task(self._model, plan, lambda progress: reports.put((task[0], progress)))


class _Progress:
    """Sum of the progress of all parts.

    Args:
        plan: The corpus.
        report: Receives the sum.
    """

    def __init__(self, plan: CorpusPlan, report: ProgressCallback | None) -> None:
        this_node = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        self.queue = Queue(actor_options={"num_cpus": 0, "scheduling_strategy": this_node})
        self._report, self._bytes = report, max(1, sum(map(input_bytes, plan.files)))
        self._parts: dict[int, CorpusProgress] = {}
        self._start = time.monotonic()

    def forward(self) -> None:
        """Report everything in the queue."""
        for part, progress in self.queue.get_nowait_batch(self.queue.qsize()):
            self._parts[part] = progress
            if self._report is not None:
                self._report(self._sum(progress.shard))

    def _sum(self, shard: str | None) -> CorpusProgress:
        parts, seconds = self._parts.values(), time.monotonic() - self._start
        rows = sum(part.rows for part in parts)
        encoded, done = sum(part.encoded_bytes for part in parts), sum(part.done_bytes for part in parts)
        return CorpusProgress(rows, seconds, encoded, done, self._bytes, shard)


@dataclass(frozen=True, slots=True)
class WorkerResources:
    """Number of workers, and the CPUs and GPUs of each."""

    workers: int
    cpus: int
    gpus: int


def worker_resources(nodes: Sequence[tuple[float, float]], workers: int | None, device: str) -> WorkerResources:
    """Divide the CPUs and GPUs of a cluster among workers.

    Args:
        nodes: CPUs and GPUs of each node.
        workers, device: See `RayCorpusEngine`.

    Raises:
        ConfigError: The cluster has no GPU, or too few CPUs or GPUs for this number of workers.
    """
    total_cpus, total_gpus = (int(sum(column)) for column in zip(*nodes, strict=True))
    if device == "cuda" and not total_gpus:
        raise ConfigError("--device cuda: the Ray cluster has no GPU. Try: --device cpu")
    on_gpu = device != "cpu" and total_gpus > 0

    def fitting(cpus_each: int) -> int:
        """Return how many workers with `cpus_each` CPUs fit on the nodes."""
        return int(sum(min(cpus // cpus_each, gpus) if on_gpu else cpus // cpus_each for cpus, gpus in nodes))

    default = fitting(1) if on_gpu else sum(cpus > 0 for cpus, _ in nodes)
    count = default if workers is None else workers
    if not 0 < count <= fitting(1):
        raise ConfigError(
            f"--workers {count}: the Ray cluster has {total_cpus} CPUs and {total_gpus} GPUs, which is enough for "
            f"{fitting(1)} workers. Try: --workers {max(1, fitting(1))}"
        )
    cpus = next(cpus for cpus in range(total_cpus, 0, -1) if fitting(cpus) >= count)
    return WorkerResources(count, cpus, int(on_gpu))


def _on_every_node(name: str | Path) -> str:
    """Return an absolute path, which is valid in processes with another current folder; hub ids are returned unchanged."""
    path = expand(name)
    return str(path.absolute()) if path.exists() else str(name)
