"""Several processes on this machine: the same run as in one, also if killed and resumed."""

import contextlib
import dataclasses
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from tests import tiny_run
from umv2 import distributed, sharding
from umv2.config import MeshConfig
from umv2.config.schema import UserError

ROOT = Path(__file__).parents[1]
# Seconds after which a process that waits for another one is killed.
PATIENCE = 400


@dataclasses.dataclass(frozen=True)
class Completed:
    """The result of one process of a job."""

    code: int
    stdout: str
    stderr: str


class Job:
    """Started processes; their output goes to files, so that none blocks on a pipe."""

    def __init__(self, folder: Path, commands: list[list[str]], env: dict[str, str]) -> None:
        folder.mkdir()
        self._outputs = [(folder / f"{i}.out", folder / f"{i}.err") for i in range(len(commands))]
        self.processes = []
        for command, (out, err) in zip(commands, self._outputs, strict=True):
            with out.open("w") as stdout, err.open("w") as stderr:
                self.processes.append(
                    subprocess.Popen(command, cwd=ROOT, env=env, stdout=stdout, stderr=stderr)
                )

    def wait(self) -> list[Completed]:
        """Waits for all processes, within the time limit, and returns their results."""
        until = time.monotonic() + PATIENCE
        for process in self.processes:
            process.wait(until - time.monotonic())
        return [
            Completed(process.returncode, out.read_text(), err.read_text())
            for process, (out, err) in zip(self.processes, self._outputs, strict=True)
        ]

    def wait_until(self, condition: Callable[[], bool]) -> None:
        """Waits for a condition while the processes run."""
        until = time.monotonic() + PATIENCE
        while not condition():
            completed = [p.poll() for p in self.processes]
            assert completed == [None] * len(completed), [
                err.read_text() for _, err in self._outputs
            ]
            assert time.monotonic() < until
            time.sleep(0.02)

    def kill(self) -> None:
        """Kills all processes."""
        for process in self.processes:
            process.kill()
        for process in self.processes:
            process.wait()


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return free.getsockname()[1]


@dataclasses.dataclass(frozen=True)
class Launcher:
    """Starts main.py in processes with their own CPU devices."""

    folder: Path
    paths: str
    cache: Path

    @contextlib.contextmanager
    def job(
        self,
        count: int,
        workdir: Path,
        *,
        devices_each: int = 1,
        options: tuple[str, ...] = (),
        environment: dict[str, str] | None = None,
        others: tuple[str, ...] = (),
        changes: dict[str, Any] | None = None,
        script: str | None = None,
    ) -> Iterator[Job]:
        """Starts a job of `count` processes; all but the first also get the arguments `others`.

        If a script is given, they run it instead of main.py, with address and process as arguments.
        """
        config = {"mesh__replica": -1} | (changes or {})
        address = f"localhost:{free_port()}"
        commands = []
        for index in range(count):
            command = [sys.executable, "main.py", f"--workdir={workdir}", *options]
            if "--mode=evaluate" not in options:
                command += tiny_run.flags(self.paths, **config)
            if count > 1:
                command += [f"--coordinator_address={address}", f"--num_processes={count}"]
                command += [f"--process_id={index}", *(others if index else ())]
            if script is not None:
                command = [sys.executable, "-c", script, address, str(index)]
            commands.append(command)
        env = tiny_run.environment(self.cache) | {
            "JAX_PLATFORMS": "cpu",
            "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices_each}",
            "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",  # compilation takes most of the time
        }
        output = self.folder / f"output_{len(list(self.folder.iterdir()))}"
        job = Job(output, commands, env | (environment or {}))
        try:
            yield job
        finally:
            job.kill()

    def run(self, count: int, workdir: Path, **options: Any) -> list[Completed]:
        """Runs a job, which must succeed."""
        with self.job(count, workdir, **options) as job:
            completed = job.wait()
        assert [process.code for process in completed] == [0] * count, completed
        return completed


@pytest.fixture
def launcher(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Launcher:
    """Starts jobs on the text of the tiny run, with a compilation cache for the session."""
    text = tmp_path_factory.mktemp("text")
    cache = tmp_path_factory.getbasetemp() / "compiled_for_processes"
    output = tmp_path / "output"
    output.mkdir()
    return Launcher(output, tiny_run.write_text(text), cache)


def records(workdir: Path) -> list[dict[str, float]]:
    lines = (workdir / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def curve(workdir: Path, name: str) -> dict[int, float]:
    """Returns a metric by step."""
    return {int(r["step"]): r[name] for r in records(workdir) if name in r}


def steps(workdir: Path) -> list[int]:
    """Returns the steps of the finished checkpoints."""
    folder = workdir / "checkpoints"
    return sorted(int(p.name) for p in folder.iterdir() if p.name.isdigit())


def assert_same_records(left: Path, right: Path, relative: float) -> None:
    left_records, right_records = records(left), records(right)
    assert [r["step"] for r in left_records] == [r["step"] for r in right_records]
    for a, b in zip(left_records, right_records, strict=True):
        assert a.keys() - {"tokens_per_second", "mfu"} == b.keys() - {"tokens_per_second", "mfu"}
        for name in a.keys() - {"wall_time", "tokens_per_second", "mfu"}:
            assert a[name] == pytest.approx(b[name], rel=relative, abs=1e-6), (a["step"], name)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("localhost:1", None, None), "needs --num_processes and --process_id too"),
        ((None, None, 1), "--process_id=1: needs --coordinator_address and --num_processes too"),
        ((None, 2, 1), "--num_processes=2, --process_id=1: needs --coordinator_address too"),
        (("localhost:1", 2, 2), "--process_id=2: must be below --num_processes=2"),
        ((None, 1, 1), "--process_id=1: must be below --num_processes=1"),
        (("localhost", 2, 1), "--coordinator_address=localhost: must be host:port"),
    ],
)
def test_inconsistent_flags_are_rejected(
    flags: tuple[str | None, int | None, int | None], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        distributed.initialize(*flags, saves_on_termination=True)


@pytest.mark.parametrize(
    ("environment", "joins", "started"),
    [
        ({}, False, None),
        ({"SLURM_JOB_ID": "7", "SLURM_NTASKS": "8", "SLURM_PROCID": "0"}, False, None),  # sbatch
        ({"SLURM_STEP_NUM_TASKS": "1"}, False, None),
        ({"SLURM_STEP_NUM_TASKS": "8"}, True, "SLURM started 8"),
        ({"OMPI_COMM_WORLD_SIZE": "2"}, True, "Open MPI started 2"),
        ({"KUBERNETES_SERVICE_HOST": "10.0.0.1"}, False, None),
        ({"KUBERNETES_SERVICE_HOST": "10.0.0.1", "JOB_COMPLETION_INDEX": "0"}, True, None),
        ({"TPU_ML_PLATFORM": "JAX", "JAX_PLATFORMS": "cpu"}, False, None),
    ],
)
def test_a_process_joins_if_a_launcher_started_several(
    monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], joins: bool, started: str | None
) -> None:
    joined: list[dict[str, Any]] = []
    monkeypatch.setattr(jax.distributed, "initialize", lambda *_, **kwargs: joined.append(kwargs))
    for name in list(os.environ):
        if name.startswith(("SLURM_", "OMPI_", "KUBERNETES_", "JOB_", "TPU_")):
            monkeypatch.delenv(name)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert distributed.initialize(saves_on_termination=True) == 0
    assert len(joined) == joins
    distributed.initialize(None, 1, None, saves_on_termination=True)  # alone, by the flag
    assert len(joined) == joins
    distributed.require_single_process("mode 'prepare'", 1)
    if started is None:
        distributed.require_single_process("mode 'prepare'", None)
    else:
        with pytest.raises(UserError, match=started):
            distributed.require_single_process("mode 'prepare'", None)


@pytest.mark.slow
@pytest.mark.parametrize(
    "environment",
    [
        "SLURM_JOB_ID=7 SLURM_STEP_NODELIST=localhost SLURM_NTASKS=2 SLURM_STEP_NUM_TASKS=2"
        " SLURM_PROCID={0} SLURM_LOCALID={0}",
        "OMPI_MCA_orte_hnp_uri=7.0;tcp://127.0.0.1:1 OMPI_COMM_WORLD_SIZE=2 OMPI_VERSION=4.1"
        " OMPI_COMM_WORLD_RANK={0} OMPI_COMM_WORLD_LOCAL_RANK={0}",
    ],
    ids=["SLURM", "Open MPI"],
)
def test_processes_of_a_launcher_find_each_other(tmp_path: Path, environment: str) -> None:
    script = (
        "from umv2 import distributed as d; import jax;"
        "print(d.initialize(saves_on_termination=True), jax.process_count())"
    )
    python = [sys.executable, "-c", script]
    commands = [["env", *environment.format(index).split(), *python] for index in range(2)]
    port = {"JAX_COORDINATOR_PORT": str(free_port())}
    job = Job(tmp_path / "job", commands, os.environ | port | {"JAX_PLATFORMS": "cpu"})
    try:
        completed = job.wait()
    finally:
        job.kill()
    assert [process.stdout for process in completed] == ["0 2\n", "1 2\n"], completed


def test_a_launcher_that_jax_cannot_query_is_a_user_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise RuntimeError("no permission")

    monkeypatch.setattr(jax.distributed, "initialize", refuse)
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "2")
    with pytest.raises(UserError, match="processes of SLURM: no permission; --coordinator_address"):
        distributed.initialize(saves_on_termination=True)


def test_jax_marks_the_environment_where_tpus_are_attached() -> None:
    print_mark = "import jax, os; print(os.environ.get('TPU_ML_PLATFORM'))"
    for forced, mark in (({}, "None"), ({"JAX_FORCE_TPU_INIT": "1"}, "JAX")):
        env = {name: value for name, value in os.environ.items() if not name.startswith("TPU_")}
        command = [sys.executable, "-c", print_mark]
        printed = subprocess.check_output(command, env=env | forced, text=True)
        assert printed.strip() == mark


def test_a_batch_is_assembled_from_the_rows_of_a_process() -> None:
    mesh = sharding.create_mesh(MeshConfig(2, 2, 1, 2, "fsdp", "auto"), 8)
    assert sharding.local_rows(mesh, 8) == tuple(range(8))
    rows = np.arange(24).reshape(8, 3)
    (batch,) = sharding.local_to_global(mesh, [rows])
    assert batch.sharding.shard_shape(batch.shape) == (2, 3)
    np.testing.assert_array_equal(batch, rows)


ROWS_OF_A_PROCESS = """
import sys, jax, numpy as np
from umv2 import sharding
jax.distributed.initialize(sys.argv[1], 2, int(sys.argv[2]), cluster_detection_method="deactivate")
grid = np.asarray(jax.devices()).reshape(2, 3)  # process, device
rows = np.arange(24).reshape(12, 2)
printed = []
for order in (grid.T.reshape(6, 1, 1, 1), grid.reshape(3, 1, 1, 2)):
    explicit = (jax.sharding.AxisType.Explicit,) * 4
    mesh = jax.sharding.Mesh(order, sharding.AXES, axis_types=explicit)
    local_rows = sharding.local_rows(mesh, 12)
    batch = sharding.local_to_global(mesh, rows[list(local_rows)])
    assert batch.shape == rows.shape
    for shard in batch.addressable_shards:
        np.testing.assert_array_equal(shard.data, rows[shard.index])
    printed += local_rows
print(*printed)
"""


def test_processes_load_the_rows_of_their_devices_in_any_order(launcher: Launcher) -> None:
    # Alternating devices; and tensor groups of two, one of which spans both processes.
    shares = [
        [*(0, 1, 4, 5, 8, 9), *range(8)],
        [*(2, 3, 6, 7, 10, 11), *range(4, 12)],
    ]
    with launcher.job(2, launcher.folder / "rows", devices_each=3, script=ROWS_OF_A_PROCESS) as job:
        completed = job.wait()
    for process, rows in zip(completed, shares, strict=True):
        assert process.code == 0, process.stderr
        assert process.stdout.splitlines()[-1].split() == [str(row) for row in rows]


@pytest.mark.slow
def test_two_processes_train_like_one(finished: tiny_run.Run, launcher: Launcher) -> None:
    workdir = launcher.folder / "run"
    first, second = launcher.run(2, workdir, devices_each=2)
    assert steps(workdir) == steps(finished.workdir)
    assert_same_records(workdir, finished.workdir, 1e-4)
    assert curve(workdir, "loss") == pytest.approx(curve(finished.workdir, "loss"), rel=1e-5)
    assert "2 processes, 4 devices" in first.stderr
    assert "step 12/12" in first.stderr
    assert [line for line in second.stderr.splitlines() if "Gloo" not in line] == []


def test_a_folder_that_is_not_shared_is_an_error(launcher: Launcher) -> None:
    here, there = launcher.folder / "here", launcher.folder / "there"
    with launcher.job(2, here, others=(f"--workdir={there}",)) as job:
        completed = job.wait()
    for process, workdir in zip(completed, (here, there), strict=True):
        assert process.code == 1
        assert f"error: {workdir}/checkpoints: is not shared by all 2 processes" in process.stderr
        assert "are not visible to 1" in process.stderr
        assert "Traceback" not in process.stderr
    assert list((here / "checkpoints").iterdir()) == []


@pytest.mark.slow
def test_an_error_in_one_process_ends_both(launcher: Launcher) -> None:
    lacking = ("--config.data.paths=('/nonexistent',)",)
    with launcher.job(2, launcher.folder / "run", others=lacking) as job:
        first, second = job.wait()
    assert (first.code, second.code) == (1, 1)
    assert "error: process 1 failed; see its error message" in first.stderr
    assert "error: data.paths: no file matches '/nonexistent'" in second.stderr
    assert "Traceback" not in first.stderr + second.stderr


# Long curves are compared in float64: in float32 rounding makes them diverge after ten steps or so.
PRECISE = {"model__compute_dtype": "float64"}
LONG = PRECISE | {
    "train__num_steps": 40,
    "train__checkpoint_interval_steps": 8,
    "train__evaluation_interval_steps": 20,
    "train__log_interval_steps": 1,
}
X64 = {"JAX_ENABLE_X64": "1"}
# Meshes by number of processes, with one device each; replica takes the remaining devices.
MESHES: dict[int, dict[str, Any]] = {
    1: {},
    2: {"mesh__memory": 2, "mesh__table_sharding": "rows"},
    4: {"mesh__fsdp": 2},
}


def largest_difference(left: dict[int, float], right: dict[int, float]) -> float:
    """Returns the largest difference of two curves, relative to the right one."""
    assert left.keys() == right.keys()
    return max(abs(left[step] - right[step]) / abs(right[step]) for step in right)


def described(mesh: dict[str, Any]) -> str:
    """Describes the fields of a mesh that are not at their defaults."""
    return " ".join(f"{name.removeprefix('mesh__')}={value}" for name, value in mesh.items())


@pytest.fixture
def uninterrupted(launcher: Launcher) -> Path:
    """The run of 40 steps in one process on one device."""
    workdir = launcher.folder / "uninterrupted"
    launcher.run(1, workdir, environment=X64, changes=LONG)
    return workdir


@pytest.mark.slow
@pytest.mark.parametrize(
    ("count", "mesh"),
    [(2, {}), (4, {"mesh__memory": 2, "mesh__table_sharding": "columns"})],
    ids=["2", "4"],
)
def test_a_killed_job_resumes_in_any_number_of_processes(
    launcher: Launcher,
    uninterrupted: Path,
    count: int,
    mesh: dict[str, Any],
    record_property: Callable[[str, str], None],
) -> None:
    killed = launcher.folder / "killed"
    with launcher.job(count, killed, environment=X64, changes=LONG | mesh) as job:
        job.wait_until((killed / "checkpoints" / "8").exists)
        job.kill()
    # The last process may have exited by itself at the loss of the first.
    assert job.processes[0].returncode == -signal.SIGKILL
    assert all(process.returncode < 0 for process in job.processes)
    saved = max(steps(killed))
    assert 8 <= saved < 40
    for resumed_count, other_mesh in MESHES.items():
        resumed = shutil.copytree(killed, launcher.folder / f"resumed_{resumed_count}")
        completed = launcher.run(resumed_count, resumed, environment=X64, changes=LONG | other_mesh)
        assert f"continuing after step {saved}" in completed[0].stderr
        assert curve(resumed, "loss").keys() == set(range(1, 41))
        differences = {
            name: largest_difference(curve(resumed, name), curve(uninterrupted, name))
            for name in ("loss", "gradient_norm", "held_out_loss")
        }
        measured = {
            "killed": count,
            "killed_mesh": described(mesh),
            "resumed": resumed_count,
            "resumed_mesh": described(other_mesh),
        }
        record_property("measured", json.dumps(measured | differences))
        assert max(differences.values()) <= 1e-5, measured | differences


@pytest.mark.slow
def test_a_signal_to_one_process_stops_both_at_the_same_step(launcher: Launcher) -> None:
    workdir = launcher.folder / "run"
    endless = {
        "train__num_steps": 100_000,
        "train__checkpoint_interval_steps": 100_000,
        "train__evaluation_interval_steps": 100_000,
    }
    with launcher.job(2, workdir, changes=endless) as job:
        job.wait_until((workdir / "metrics.jsonl").exists)
        job.wait_until(lambda: len(records(workdir)) > 2)
        job.processes[1].send_signal(signal.SIGTERM)
        first, second = job.wait()
    assert (first.code, second.code) == (0, 0), (first, second)
    (saved,) = steps(workdir)
    stopped = f"stopped by a signal to another process after step {saved}; the state is saved"
    assert stopped in first.stderr
    assert "Traceback" not in first.stderr + second.stderr


@pytest.mark.slow
def test_a_partly_damaged_checkpoint_is_skipped_by_all_processes(launcher: Launcher) -> None:
    workdir = launcher.folder / "run"
    tables = {"mesh__memory": 2, "mesh__table_sharding": "rows"}
    launcher.run(2, workdir, changes=tables)
    expected = curve(workdir, "loss")
    assert steps(workdir)[-2:] == [9, 12]
    state = workdir / "checkpoints" / "12" / "state"
    largest = max(state.glob("ocdbt.process_1/d/*"), key=lambda file: file.stat().st_size)
    os.truncate(largest, 100)
    for process in launcher.run(2, workdir, changes=tables):
        assert "skipping a damaged checkpoint" in process.stderr
    assert (workdir / "checkpoints" / "damaged_12").exists()
    assert curve(workdir, "loss") == pytest.approx(expected, rel=1e-5)


@pytest.mark.slow
def test_processes_of_one_tensor_group_load_the_same_rows(
    finished: tiny_run.Run, launcher: Launcher
) -> None:
    workdir = launcher.folder / "run"
    launcher.run(2, workdir, changes={"mesh__tensor": 2})
    assert curve(workdir, "loss") == pytest.approx(curve(finished.workdir, "loss"), rel=1e-5)


@pytest.mark.slow
def test_divergence_ends_all_processes(launcher: Launcher) -> None:
    workdir = launcher.folder / "run"
    with launcher.job(2, workdir, changes={"optimizer__learning_rate": 1e38}) as job:
        completed = job.wait()
    for process in completed:
        assert process.code == 1
        assert "The last good checkpoint is kept" in process.stderr
        assert "Traceback" not in process.stderr


@pytest.mark.slow
def test_two_processes_evaluate_and_report_once(finished: tiny_run.Run, launcher: Launcher) -> None:
    workdir = Path(shutil.copytree(finished.workdir, launcher.folder / "run"))
    changes = tiny_run.flags(finished.paths, mesh__replica=-1)
    first, second = launcher.run(
        2, workdir, options=("--mode=evaluate", "--json", *changes), devices_each=2
    )
    printed = [line for line in first.stdout.splitlines() if "Gloo" not in line]
    report = json.loads(*printed)
    assert report["held_out_loss"] == pytest.approx(
        curve(finished.workdir, "held_out_loss")[12], rel=1e-5
    )
    assert json.loads((workdir / "evaluation.json").read_text()) == report
    assert [line for line in second.stdout.splitlines() if "Gloo" not in line] == []


def test_single_process_modes_reject_several_processes(launcher: Launcher) -> None:
    with launcher.job(2, launcher.folder / "run", options=("--mode=prepare",)) as job:
        completed = job.wait()
    for process in completed:
        assert process.code == 1
        assert process.stderr == "error: --num_processes=2: mode 'prepare' runs in one process\n"
