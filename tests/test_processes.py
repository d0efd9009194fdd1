"""Several real processes on this machine: the same run as in one, whatever ends or resumes it."""

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
# A process that waits for another which does not come is killed after so many seconds.
PATIENCE = 400


@dataclasses.dataclass(frozen=True)
class Ended:
    """How one process of a job ended."""

    code: int
    stdout: str
    stderr: str


class Job:
    """Started processes; their output goes to files, so that none waits for a reader."""

    def __init__(self, folder: Path, commands: list[list[str]], env: dict[str, str]) -> None:
        folder.mkdir()
        self._outputs = [(folder / f"{i}.out", folder / f"{i}.err") for i in range(len(commands))]
        self.processes = []
        for command, (out, err) in zip(commands, self._outputs, strict=True):
            with out.open("w") as stdout, err.open("w") as stderr:
                self.processes.append(
                    subprocess.Popen(command, cwd=ROOT, env=env, stdout=stdout, stderr=stderr)
                )

    def wait(self) -> list[Ended]:
        """Returns how each ended, in time."""
        until = time.monotonic() + PATIENCE
        for process in self.processes:
            process.wait(until - time.monotonic())
        return [
            Ended(process.returncode, out.read_text(), err.read_text())
            for process, (out, err) in zip(self.processes, self._outputs, strict=True)
        ]

    def wait_until(self, condition: Callable[[], bool]) -> None:
        """Waits for what the processes will do while they run."""
        until = time.monotonic() + PATIENCE
        while not condition():
            ended = [p.poll() for p in self.processes]
            assert ended == [None] * len(ended), [err.read_text() for _, err in self._outputs]
            assert time.monotonic() < until
            time.sleep(0.02)

    def kill(self) -> None:
        """Ends them at once, without a word."""
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
    """Starts main.py in processes of their own CPU devices."""

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
        """A job of `count` processes; those after the first take `others`, too.

        In place of main.py they run a script, whose arguments are address and process.
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
            "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",  # compiling takes most of the time
        }
        output = self.folder / f"output_{len(list(self.folder.iterdir()))}"
        job = Job(output, commands, env | (environment or {}))
        try:
            yield job
        finally:
            job.kill()

    def run(self, count: int, workdir: Path, **options: Any) -> list[Ended]:
        """Runs a job to its end, which must be a good one."""
        with self.job(count, workdir, **options) as job:
            ended = job.wait()
        assert [process.code for process in ended] == [0] * count, ended
        return ended


@pytest.fixture
def launcher(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Launcher:
    """Jobs on the text of the tiny run; what they compile is kept for the session."""
    text = tmp_path_factory.mktemp("text")
    cache = tmp_path_factory.getbasetemp() / "compiled_for_processes"
    output = tmp_path / "output"
    output.mkdir()
    return Launcher(output, tiny_run.write_text(text), cache)


def records(workdir: Path) -> list[dict[str, float]]:
    lines = (workdir / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def curve(workdir: Path, name: str) -> dict[int, float]:
    """A measure by the step after which it was taken."""
    return {int(r["step"]): r[name] for r in records(workdir) if name in r}


def steps(workdir: Path) -> list[int]:
    """Steps of the finished checkpoints."""
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
def test_flags_that_do_not_fit_together(
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
def test_a_process_joins_where_a_launcher_started_several(
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
    distributed.require_alone("mode 'prepare'", 1)
    if started is None:
        distributed.require_alone("mode 'prepare'", None)
    else:
        with pytest.raises(UserError, match=started):
            distributed.require_alone("mode 'prepare'", None)


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
        ended = job.wait()
    finally:
        job.kill()
    assert [process.stdout for process in ended] == ["0 2\n", "1 2\n"], ended


def test_a_launcher_that_jax_cannot_ask_is_one_error(monkeypatch: pytest.MonkeyPatch) -> None:
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
    # Alternating devices; and pairs of one tensor group, of which one pair is of both processes.
    shares = [
        [*(0, 1, 4, 5, 8, 9), *range(8)],
        [*(2, 3, 6, 7, 10, 11), *range(4, 12)],
    ]
    with launcher.job(2, launcher.folder / "rows", devices_each=3, script=ROWS_OF_A_PROCESS) as job:
        ended = job.wait()
    for process, rows in zip(ended, shares, strict=True):
        assert process.code == 0, process.stderr
        assert process.stdout.splitlines()[-1].split() == [str(row) for row in rows]


def test_two_processes_train_as_one_does(finished: tiny_run.Run, launcher: Launcher) -> None:
    workdir = launcher.folder / "run"
    first, second = launcher.run(2, workdir, devices_each=2)
    assert steps(workdir) == steps(finished.workdir)
    assert_same_records(workdir, finished.workdir, 1e-4)
    assert curve(workdir, "loss") == pytest.approx(curve(finished.workdir, "loss"), rel=1e-5)
    assert "2 processes, 4 devices" in first.stderr
    assert "step 12/12" in first.stderr
    assert [line for line in second.stderr.splitlines() if "Gloo" not in line] == []


def test_a_folder_that_is_not_shared_is_one_error(launcher: Launcher) -> None:
    here, there = launcher.folder / "here", launcher.folder / "there"
    with launcher.job(2, here, others=(f"--workdir={there}",)) as job:
        ended = job.wait()
    for process, workdir in zip(ended, (here, there), strict=True):
        assert process.code == 1
        assert f"error: {workdir}/checkpoints: is not shared by all 2 processes" in process.stderr
        assert "is not seen by 1" in process.stderr
        assert "Traceback" not in process.stderr
    assert list((here / "checkpoints").iterdir()) == []


def test_what_one_process_lacks_ends_both(launcher: Launcher) -> None:
    lacking = ("--config.data.paths=('/nonexistent',)",)
    with launcher.job(2, launcher.folder / "run", others=lacking) as job:
        first, second = job.wait()
    assert (first.code, second.code) == (1, 1)
    assert "error: process 1 failed, and says why" in first.stderr
    assert "error: data.paths: no file matches '/nonexistent'" in second.stderr
    assert "Traceback" not in first.stderr + second.stderr


# Long curves are compared in float64: those of float32 part after some ten steps by rounding alone.
PRECISE = {"model__compute_dtype": "float64"}
LONG = PRECISE | {
    "train__num_steps": 40,
    "train__checkpoint_interval_steps": 8,
    "train__evaluation_interval_steps": 20,
    "train__log_interval_steps": 1,
}
X64 = {"JAX_ENABLE_X64": "1"}
# Of a job of so many processes with a device each; replica takes what is left.
MESHES: dict[int, dict[str, Any]] = {
    1: {},
    2: {"mesh__memory": 2, "mesh__table_sharding": "rows"},
    4: {"mesh__fsdp": 2},
}


def largest_difference(left: dict[int, float], right: dict[int, float]) -> float:
    """Of two curves over the same steps, relative to the right one."""
    assert left.keys() == right.keys()
    return max(abs(left[step] - right[step]) / abs(right[step]) for step in right)


def described(mesh: dict[str, Any]) -> str:
    """The fields of a mesh that are not at their defaults."""
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
    # The last may have ended by itself at the loss of the first.
    assert job.processes[0].returncode == -signal.SIGKILL
    assert all(process.returncode < 0 for process in job.processes)
    saved = max(steps(killed))
    assert 8 <= saved < 40
    for resumed_count, other_mesh in MESHES.items():
        resumed = shutil.copytree(killed, launcher.folder / f"resumed_{resumed_count}")
        ended = launcher.run(resumed_count, resumed, environment=X64, changes=LONG | other_mesh)
        assert f"continuing after step {saved}" in ended[0].stderr
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
def test_a_signal_to_one_process_stops_both_at_one_step(launcher: Launcher) -> None:
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
def test_a_checkpoint_of_which_one_part_is_damaged_is_skipped_by_all(launcher: Launcher) -> None:
    workdir = launcher.folder / "run"
    tables = {"mesh__memory": 2, "mesh__table_sharding": "rows"}
    launcher.run(2, workdir, changes=tables)
    whole = curve(workdir, "loss")
    assert steps(workdir)[-2:] == [9, 12]
    state = workdir / "checkpoints" / "12" / "state"
    largest = max(state.glob("ocdbt.process_1/d/*"), key=lambda file: file.stat().st_size)
    os.truncate(largest, 100)
    for process in launcher.run(2, workdir, changes=tables):
        assert "skipping a damaged checkpoint" in process.stderr
    assert (workdir / "checkpoints" / "damaged_12").exists()
    assert curve(workdir, "loss") == pytest.approx(whole, rel=1e-5)


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
        ended = job.wait()
    for process in ended:
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


def test_modes_of_one_process_refuse_several(launcher: Launcher) -> None:
    with launcher.job(2, launcher.folder / "run", options=("--mode=prepare",)) as job:
        ended = job.wait()
    for process in ended:
        assert process.code == 1
        assert process.stderr == "error: --num_processes=2: mode 'prepare' runs in one process\n"
