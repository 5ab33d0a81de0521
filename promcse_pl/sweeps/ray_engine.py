"""Start the jobs of a sweep on a Ray cluster: an actor per job starts its process and forwards stop signals."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from promcse_pl.config import SweepConfig
from promcse_pl.sweeps.plan import SharedSettings
from promcse_pl.sweeps.pool import Task, thread_variables
from promcse_pl.training.distributed import LAUNCHER_VARIABLES
from promcse_pl.utils.errors import ConfigError
from promcse_pl.utils.interpreter import python_command
from promcse_pl.utils.processes import PROCESS_POLL_SECONDS, RANK_THREADS, ChildProcess, start_process
from promcse_pl.utils.ray_cluster import cluster_nodes, ray_cluster
from promcse_pl.utils.terminal import print_line

ANSWER_SECONDS = 0.5
"""Maximum duration of a `JobActor.wait` call. A stop signal is delivered after the current call."""
MAX_REASON_LENGTH = 300
"""Maximum number of characters of Ray's reason for a lost job."""
_ACTOR_ENVIRONMENT = {"RAY_kill_child_processes_on_worker_exit": "false"}
"""By default, Ray kills a job with SIGKILL if the sweep is killed. With this setting the job receives SIGTERM and saves."""


class JobActor:
    """Runs the process of one job on the node where Ray starts this actor."""

    def start(self, task: Task, environment: Mapping[str, str], folder: Path) -> None:
        """Start the process.

        Args:
            task: The task.
            environment: Variables that are set in addition to those of the node. The node's rank variables are removed:
                they belong to the command that started Ray, such as srun.
            folder: Current folder of the process; the paths of the task are relative to it.
        """
        ranks = {name for names in LAUNCHER_VARIABLES.values() for name in names}
        of_node = {name: value for name, value in os.environ.items() if name not in ranks}
        self.child: ChildProcess = start_process(
            python_command(task.target, *task.arguments),
            {**of_node, **environment},
            output=folder / task.output,
            parent_signal=signal.SIGTERM,
            cwd=folder,
        )

    def wait(self, seconds: float) -> int | None:
        """Return the exit code of the process, negative for a signal; None if it still runs after some seconds."""
        deadline = time.monotonic() + seconds
        while (code := self.child.poll()) is None and time.monotonic() < deadline:
            time.sleep(PROCESS_POLL_SECONDS)
        return code

    def terminate(self) -> None:
        """Send SIGTERM to the process."""
        self.child.terminate()

    def kill(self) -> None:
        """Kill the process and its group."""
        self.child.kill()


class RayProcess:
    """The process of a job on a Ray cluster, as a `StoppableProcess`; it starts when its CPUs and GPUs are free.

    Args:
        ray: The module.
        actor: Handle of a `JobActor`.
        answer: Object reference that its method `start` returned.
        output: File to which the reason is appended if the job is lost.
    """

    def __init__(self, ray: Any, actor: Any, answer: Any, output: Path) -> None:  # noqa: ANN401  (Ray's)
        self._ray, self._actor, self._answer, self._output = ray, actor, answer, output
        self._code: int | None = None
        self._is_started = self._is_terminated = False

    def poll(self) -> int | None:
        """Return the exit code, negative for a signal, 1 if Ray lost the job; None while it runs or waits for resources."""
        if self._code is None and self._ray.wait([self._answer], timeout=0)[0]:
            try:
                self._code = self._ray.get(self._answer)
                self._is_started = True
            except self._ray.exceptions.ActorUnavailableError:  # its node cannot be reached at the moment
                pass
            except self._ray.exceptions.RayError as error:
                self._report(error)
                self._code = 1
            if self._code is None:
                self._answer = self._actor.wait.remote(ANSWER_SECONDS)
            else:
                self._ray.kill(self._actor)
        return self._code

    def terminate(self) -> None:
        """Send SIGTERM, but only once; a job that still waits for resources is cancelled."""
        if self.poll() is None and not self._is_terminated:
            if self._is_started:
                self._actor.terminate.remote()
            else:
                self._ray.kill(self._actor)
                self._code = -signal.SIGTERM
        self._is_terminated = True

    def kill(self) -> None:
        """Kill the process and its group."""
        if self.poll() is None:
            self._actor.kill.remote()

    def _report(self, error: Exception) -> None:
        """Append Ray's reason for the lost job to the job's output, as its error line."""
        lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
        reason = lines[-1].partition(" Some common causes")[0][:MAX_REASON_LENGTH]
        with self._output.open("a", encoding="utf-8") as stream:
            stream.write(f"error: Ray lost the job: {reason}\n")


class RaySweepEngine:
    """Starts processes on a Ray cluster; they receive SIGTERM if this process is killed.

    Args:
        ray: The module, connected to a cluster.
        settings: Settings of the sweep.
        shared: Settings of the first start if the sweep is resumed.

    Attributes:
        threads: Threads of a job.
    """

    def __init__(self, ray: Any, settings: SweepConfig, shared: SharedSettings | None) -> None:  # noqa: ANN401  (Ray's)
        self.parallel = settings.parallel
        self.threads = job_threads(settings, shared)
        self.rank_threads: int | None = self.threads
        self._ray = ray
        self._environment = {**thread_variables(self.threads), RANK_THREADS: str(self.threads)}
        if not settings.job_gpus:
            self._environment["CUDA_VISIBLE_DEVICES"] = ""
        self._actors = ray.remote(JobActor).options(
            num_cpus=settings.job_cpus or self.threads,
            num_gpus=settings.job_gpus or 0,
            runtime_env={"env_vars": _ACTOR_ENVIRONMENT},
        )

    def start(self, task: Task, slot: int) -> RayProcess:  # noqa: ARG002  (Ray chooses node and GPUs)
        """Submit a task; it starts when the cluster has free CPUs and GPUs for it."""
        actor = self._actors.remote()
        answer = actor.start.remote(task, self._environment, Path.cwd())
        return RayProcess(self._ray, actor, answer, task.output)


def job_threads(settings: SweepConfig, shared: SharedSettings | None) -> int:
    """Return the number of threads of a job: that of the first start of the sweep, else its reserved CPUs."""
    return shared.threads if shared else settings.job_cpus or 1


@contextmanager
def ray_engine(settings: SweepConfig, shared: SharedSettings | None) -> Iterator[RaySweepEngine]:
    """Connect to a Ray cluster, or start one on this machine; disconnect, or stop it, at the end.

    Args:
        settings: Settings of the sweep.
        shared: Settings of the first start if the sweep is resumed.

    Raises:
        ConfigError: Ray is not installed, the cluster cannot be reached, or the local one is too small for a job.
    """
    with ray_cluster(settings.address, "sweep.address=") as ray:
        _check_resources(ray, settings, settings.job_cpus or job_threads(settings, shared))
        yield RaySweepEngine(ray, settings, shared)


def _check_resources(ray: Any, settings: SweepConfig, cpus: int) -> None:  # noqa: ANN401  (Ray's)
    """Print the size of the cluster, and check that one of its nodes is large enough for a job.

    Raises:
        ConfigError: The local cluster is too small. For other clusters, which may grow, a warning is printed.
    """
    gpus = settings.job_gpus or 0
    nodes = cluster_nodes(ray)
    all_cpus, all_gpus = (sum(node[part] for node in nodes) for part in (0, 1))
    address = ray.get_runtime_context().gcs_address
    size = f"{len(nodes)} {'node' if len(nodes) == 1 else 'nodes'}, {all_cpus:g} CPUs, {all_gpus:g} GPUs"
    print_line(f"Ray cluster {address}: {size}; {cpus} CPUs and {gpus:g} GPUs per job")
    if any(node[0] >= cpus and node[1] >= gpus for node in nodes):
        return
    problem = f"sweep.job_cpus={cpus} sweep.job_gpus={gpus:g} do not fit on a node of the Ray cluster ({size})"
    if settings.address:
        print_line(f"warning: {problem}; the jobs wait until a larger node joins")
        return
    fitting = f"sweep.job_cpus={min(cpus, int(all_cpus))} sweep.job_gpus={min(gpus, all_gpus):g}"
    raise ConfigError(f"{problem}. Try: {fitting}")
