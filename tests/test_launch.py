"""The launch scripts of experiments/launch, with stubs for the cluster commands."""

import importlib
import os
import shlex
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
LAUNCH = ROOT / "experiments" / "launch"
# Arguments that need quoting in shells and YAML.
ARGUMENTS = ["--config=configs/tiny.py", "--config.data.paths=('a b.txt', 'c: #d')", "--x=$HOME"]
JOBSETS = {
    "gpu": {"GPUS": "4"},
    "tpu": {"SLICES": "2", "TPU": "tpu-v6e-slice", "TOPOLOGY": "4x4"},
}


def stub(folder: Path, name: str, script: str) -> None:
    (folder / name).write_text(f"#!/usr/bin/env bash\n{script}\n")
    (folder / name).chmod(0o755)


def launch(
    *command: str | Path, path: Path | None = None, **variables: str
) -> subprocess.CompletedProcess[str]:
    env = {"PATH": f"{path}:{os.environ['PATH']}" if path else os.environ["PATH"]} | variables
    return subprocess.run(
        [str(part) for part in command], env=env, capture_output=True, text=True, check=False
    )


def jobset(kind: str, **variables: str) -> dict[str, Any]:
    given = {"IMAGE": "image:1", "VOLUME": "disk", "HOSTS": "4"} | JOBSETS[kind] | variables
    printed = launch(LAUNCH / "jobset.sh", kind, *ARGUMENTS, path=None, **given)
    assert printed.returncode == 0, printed.stderr
    return importlib.import_module("yaml").safe_load(printed.stdout)


def container(job: dict[str, Any]) -> dict[str, Any]:
    (replicated,) = job["spec"]["replicatedJobs"]
    (container_spec,) = replicated["template"]["spec"]["template"]["spec"]["containers"]
    return container_spec


def test_every_script_has_valid_syntax() -> None:
    scripts = [path for path in LAUNCH.iterdir() if path.suffix in (".sh", ".sbatch")]
    assert len(scripts) == 3
    for script in scripts:
        read = launch("bash", "-n", script)
        assert read.returncode == 0, read.stderr


@pytest.mark.parametrize(
    ("where", "expected"),
    [
        ({"TPU": "v6"}, ["compute", "tpus", "tpu-vm", "ssh", "v6", "--worker=all"]),
        (
            {"QUEUED_RESOURCE": "q"},
            ["queued-resources", "ssh", "q", "--node=all", "--worker=all", "--batch-size=all"],
        ),
    ],
)
def test_every_host_of_a_tpu_runs_the_command(
    tmp_path: Path, where: dict[str, str], expected: list[str]
) -> None:
    stub(tmp_path, "gcloud", 'printf "%s\\n" "$@"')
    started = launch(LAUNCH / "tpu.sh", *ARGUMENTS, path=tmp_path, ZONE="z", FOLDER="a b", **where)
    *given, command = started.stdout.splitlines()
    assert [part for part in given if part in expected] == expected
    assert "--zone=z" in given
    assert shlex.split(command.removeprefix("--command=")) == [
        *("cd", "a b", "&&", "exec", ".venv/bin/python", "main.py"),
        *ARGUMENTS,
    ]


def test_a_script_names_missing_variables() -> None:
    assert "ZONE: the zone" in launch(LAUNCH / "tpu.sh").stderr
    assert "TPU: or QUEUED_RESOURCE" in launch(LAUNCH / "tpu.sh", ZONE="z").stderr
    assert "IMAGE" in launch(LAUNCH / "jobset.sh", "gpu").stderr


def test_slurm_starts_one_process_per_gpu_and_signals_it_before_the_time_limit(
    tmp_path: Path,
) -> None:
    stub(tmp_path, "srun", 'printf "%s\\n" "$@"')
    started = launch("bash", LAUNCH / "slurm.sbatch", *ARGUMENTS, path=tmp_path)
    assert started.stdout.splitlines() == [
        *("--kill-on-bad-exit=1", ".venv/bin/python", "main.py"),
        *ARGUMENTS,
    ]
    lines = (LAUNCH / "slurm.sbatch").read_text().splitlines()
    directives = dict(
        line.removeprefix("#SBATCH --").partition("=")[::2]
        for line in lines
        if line.startswith("#SBATCH ")
    )
    assert directives["gpus-per-node"] == directives["ntasks-per-node"]
    assert "gpus-per-task" not in directives
    assert directives["signal"].startswith("TERM@")
    first_command = next(i for i, line in enumerate(lines) if line and not line.startswith("#"))
    assert not any(line.startswith("#SBATCH") for line in lines[first_command:])


@pytest.mark.parametrize("kind", JOBSETS)
def test_a_jobset_has_one_pod_per_host(kind: str) -> None:
    job = jobset(kind, NAME="run")
    assert (job["kind"], job["metadata"]["name"]) == ("JobSet", "run")
    (replicated,) = job["spec"]["replicatedJobs"]
    assert replicated["replicas"] == (2 if kind == "tpu" else 1)
    pods = replicated["template"]["spec"]
    assert (pods["completions"], pods["parallelism"], pods["backoffLimit"]) == (4, 4, 0)
    assert pods["completionMode"] == "Indexed"
    limits = container(job)["resources"]["limits"]
    assert limits == {"nvidia.com/gpu": 4} if kind == "gpu" else {"google.com/tpu": 4}
    volumes = {volume["name"] for volume in pods["template"]["spec"]["volumes"]}
    assert volumes == {mount["name"] for mount in container(job)["volumeMounts"]}


@pytest.mark.parametrize("kind", JOBSETS)
def test_a_pod_runs_main_with_its_place_in_the_job(tmp_path: Path, kind: str) -> None:
    container_spec = container(jobset(kind))
    stub(tmp_path, "python", 'printf "%s\\n" "$@"; exit 3')
    ran = launch(
        *container_spec["command"], *container_spec["args"], path=tmp_path, JOB_COMPLETION_INDEX="2"
    )
    assert ran.returncode == 3
    place = ["--coordinator_address=umv2-host-0-0.umv2:8476", "--num_processes=4", "--process_id=2"]
    assert ran.stdout.splitlines() == ["main.py", *(place if kind == "gpu" else []), *ARGUMENTS]


@pytest.mark.parametrize("kind", JOBSETS)
def test_a_terminated_pod_lets_main_save_and_does_not_succeed(tmp_path: Path, kind: str) -> None:
    container_spec = container(jobset(kind))
    saved, started = tmp_path / "saved", tmp_path / "started"
    stub(
        tmp_path,
        "python",
        f"trap 'touch {saved}; exit 0' TERM; touch {started}; while :; do sleep 0.05; done",
    )
    pod = subprocess.Popen(
        [*container_spec["command"], *container_spec["args"]],
        env={"PATH": f"{tmp_path}:{os.environ['PATH']}"},
    )
    until = time.monotonic() + 30
    while not started.exists() and time.monotonic() < until:
        time.sleep(0.02)
    pod.send_signal(signal.SIGTERM)
    assert pod.wait(30) == 143
    assert saved.exists()
