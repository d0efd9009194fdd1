"""The search: which candidates it compiles, in which order, and what it does if that fails."""

import collections
import dataclasses
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from configs import tiny
from tests.extras import needs_libtpu
from umv2.config import Config, from_config_dict
from umv2.config.schema import UserError
from umv2.planning import ahead_of_time, plan, search, search_space, topology
from umv2.planning.hlo import workload

pytestmark = needs_libtpu  # a topology is parsed only if its compiler is installed
PLACE = "v5e:4x2"


def config(**changes: Any) -> Config:
    """Returns tiny with changes by path, with __ for a dot."""
    values = tiny.get_config()
    values.train.batch_size = 64
    values.update_from_flattened_dict({k.replace("__", "."): v for k, v in changes.items()})
    return from_config_dict(values)


class Compiler:
    """Takes the place of `plan.plan`: temporaries are `factor` times their lower bound.

    `fail` may raise an error for a configuration, or wait.
    """

    def __init__(self, factor: float = 1.0, fail: Callable[[Config], None] = lambda _: None):
        self.factor, self.fail, self.constant = factor, fail, 0
        self.compiled: list[Config] = []

    def __call__(self, name: str, config: Config, place: str, **_: Any) -> plan.Plan:
        self.compiled.append(config)
        self.fail(config)
        target = topology.parse(place)
        sizes = search_space.mesh_sizes(config, target.num_devices)
        parts = ahead_of_time.argument_bytes(config, sizes, "train")
        least = search_space.least_temporaries(config, sizes, parts, target)
        measured = ahead_of_time.Measurement(
            mesh=sizes,
            table_sharding="rows",
            device_kind="a chip",
            arguments=sum(parts.values()),
            parts=parts,
            needed=sum(parts.values()) + round(self.factor * least) + self.constant,
            available=None,
            refusal=None,
            program=workload.read(PROGRAM),
            collectives=(),
            seconds=1.0,
            process_bytes=2**30,
        )
        return plan.Plan(name, config, target, "train", measured)


PROGRAM = """HloModule jit_f, num_partitions=8

ENTRY %main (p: bf16[8,16]) -> bf16[8,16] {
  %p = bf16[8,16]{1,0} parameter(0)
  ROOT %sum = bf16[8,16]{1,0} add(%p, %p)
}
"""


@pytest.fixture
def compiler(monkeypatch: pytest.MonkeyPatch) -> Compiler:
    fake = Compiler()
    monkeypatch.setattr(plan, "plan", fake)
    return fake


def mesh_and_policy(config: Config) -> Any:
    return config.mesh, config.model.remat


def run(*, limit: int, enough: int | None = None, workers: int = 1) -> search.Search:
    return search.search(
        "tiny", config(), PLACE, limit=limit, enough=enough, remat=("full",), max_workers=workers
    )


def test_the_best_of_each_size_of_memory_comes_first(compiler: Compiler) -> None:
    run(limit=8)
    sizes = [each.mesh.memory for each in compiler.compiled]
    assert sorted(sizes[:4]) == [1, 2, 4, 8]
    assert len(set(map(mesh_and_policy, compiler.compiled))) == 8
    first: dict[int, Config] = {}
    target = topology.parse(PLACE)
    for candidate in search_space.candidates(config(), target, remat=("full",)):
        first.setdefault(candidate.config.mesh.memory, candidate.config)
    assert [first[size] for size in sizes[:4]] == compiler.compiled[:4]


@pytest.mark.parametrize("factor", [1.0, 4.0])
def test_the_fewest_microbatches_that_fit_are_found(
    factor: float, compiler: Compiler, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiler.factor = factor
    one = config(model__ffn_size=4096)
    # A chip in which, of 64 sequences per device, only some fit at once.
    candidates = search_space.candidates(one, topology.parse(PLACE), remat=("full",))
    most = max(candidate.arguments + candidate.temporaries for candidate in candidates)
    chip = dataclasses.replace(topology.parse(PLACE).chip, memory_bytes=most // 2)
    small = dataclasses.replace(topology.parse(PLACE), chip=chip)
    monkeypatch.setattr(topology, "parse", lambda _: small)
    found = search.search("tiny", one, PLACE, limit=1000, remat=("full",), max_workers=2)
    fitting: dict[Any, int] = {}
    for each in found.plans:
        if each.fits:
            key, accumulation = (
                mesh_and_policy(each.config),
                each.config.train.gradient_accumulation,
            )
            fitting[key] = min(accumulation, fitting.get(key, accumulation))
    assert len(fitting) > 5
    checked = 0
    for candidate in search_space.candidates(one, small, remat=("full",)):
        fits = candidate.arguments + round(factor * candidate.temporaries) <= chip.memory_bytes
        best = fitting.get(mesh_and_policy(candidate.config))
        if best is not None and fits:
            checked += 1
            assert best <= candidate.config.train.gradient_accumulation
    assert checked > len(fitting)
    assert any(accumulation > 1 for accumulation in fitting.values())
    assert len(compiler.compiled) == len(set(compiler.compiled))


def test_microbatches_that_do_not_help_are_not_tried(compiler: Compiler) -> None:
    compiler.constant = 2**40  # no number of microbatches makes these temporaries fit
    run(limit=12)
    tried = collections.Counter(map(mesh_and_policy, compiler.compiled))
    assert max(tried.values()) == 1
    assert len(tried) == 12


def test_programs_are_compiled_at_a_time(compiler: Compiler) -> None:
    together = threading.Barrier(2, timeout=30)

    def wait(_: Config) -> None:
        together.wait()

    compiler.fail = wait
    found = run(limit=4, workers=2)
    assert len(found.plans) == 4


def test_a_compiler_that_was_killed_gets_another_try_alone(compiler: Compiler) -> None:
    running: list[Config] = []
    killed: list[Config] = []
    lock, both = threading.Lock(), threading.Event()

    def fail(config: Config) -> None:
        with lock:
            running.append(config)
            second = len(running) == 2
        if second:
            both.set()
            killed.append(config)
            raise ahead_of_time.Killed("killed")

    compiler.fail = fail
    found = run(limit=4, workers=2)
    assert len(found.plans) == 4
    assert compiler.compiled.count(killed[0]) == 2
    assert killed[0] in [each.config for each in found.plans]
    assert len(compiler.compiled) == 5


def test_candidates_that_fail_are_skipped(compiler: Compiler) -> None:
    def fail(config: Config) -> None:
        if config.mesh.memory > 1:
            raise RuntimeError("the compiler crashed")
        if len(compiler.compiled) == 1:
            raise ahead_of_time.Killed("killed")

    compiler.fail = fail
    found = run(limit=8)
    assert 0 < len(found.plans) < 8 == len(compiler.compiled)
    assert {each.config.mesh.memory for each in found.plans} == {1}
    assert len(set(map(mesh_and_policy, compiler.compiled))) == 8


def test_a_search_in_which_nothing_compiles_raises_the_first_error(compiler: Compiler) -> None:
    def fail(_: Config) -> None:
        raise UserError(f"number {len(compiler.compiled)}")

    compiler.fail = fail
    with pytest.raises(UserError, match=r"^number 1$"):
        run(limit=3)
    assert len(compiler.compiled) == 3


def test_a_search_stops_after_enough_meshes_that_fit(compiler: Compiler) -> None:
    found = run(limit=8, enough=3)
    assert len(found.plans) == 3 == len(compiler.compiled)


def test_as_many_compilers_run_as_cores_and_memory_allow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: 6)
    for available, workers in ((2**40, 6), (7 * 2**30, 3), (0, 1)):
        monkeypatch.setattr(search, "_available_bytes", lambda size=available: size)
        assert search.num_workers() == workers
    monkeypatch.setattr(search, "_available_bytes", lambda: 7 * 2**30)
    planned = Compiler()("tiny", config(), PLACE)
    assert search.num_workers([planned]) == 6
    large = dataclasses.replace(planned.measured, process_bytes=7 * 2**29)
    assert search.num_workers([planned, dataclasses.replace(planned, measured=large)]) == 2


def test_the_available_memory_is_read() -> None:
    assert Path("/proc/meminfo").exists() == (search._available_bytes() > 0)


@pytest.mark.parametrize(
    ("script", "error", "limit"),
    [
        ("kill -KILL $$", ahead_of_time.Killed, None),
        ("exec sleep 60", ahead_of_time.TooSlow, 0.1),
        ("echo the reason >&2; exit 1", RuntimeError, None),
    ],
)
def test_a_compiler_that_does_not_answer_is_an_error(
    script: str,
    error: type[Exception],
    limit: float | None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    program = tmp_path / "python"
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(0o755)
    monkeypatch.setattr("sys.executable", str(program))
    with pytest.raises(error, match=r"killed|longer than|the reason") as raised:
        ahead_of_time.measure(config(), topology.parse(PLACE), "train", timeout_seconds=limit)
    assert type(raised.value) is error
