"""Collects measurements that tests make: a results page shows what a test compares to a tolerance.

Such a test calls pytest's `record_property("measured", <JSON object>)` and needs to know nothing
about results.
"""

import dataclasses
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from absl import flags

from experiments import measurements
from umv2.config.schema import UserError

_ROOT = Path(__file__).parents[2]
CASES = flags.DEFINE_list("cases", [], "Run the cases whose names contain one; default: all.")


@dataclasses.dataclass(frozen=True)
class Outcome:
    """The measurements of tests, and the names of those that failed."""

    records: list[dict[str, Any]]
    failed: list[str]

    def require_passed(self) -> None:
        """Raises a UserError that names the failed tests, if any."""
        if self.failed:
            raise UserError(f"{len(self.failed)} tests failed: {', '.join(self.failed[:3])}")


def run(*tests: str, parts: Sequence[str] | None = None) -> Outcome:
    """Runs tests of the clone; pytest's output goes to standard error.

    Args:
      tests: FILE or FILE::TEST, relative to the root of the clone.
      parts: runs the tests whose names contain one of these; None: --cases; empty: all.

    Raises:
      UserError: no test was run.
    """
    if importlib.util.find_spec("pytest") is None:
        raise UserError("pytest: not installed; pip install -r requirements-dev.txt in the clone")
    selected = CASES.value if parts is None else parts
    selection = ["-k", " or ".join(selected)] if selected else []
    # CI sets this variable to skip slow tests when time is short.
    environment = {name: x for name, x in os.environ.items() if name != "SLOW_TESTS_UNTIL"}
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder, "report.xml")
        command = [sys.executable, "-m", "pytest", *tests, *selection]
        command += [f"--junitxml={report}", "-o", "junit_family=xunit1"]
        completed = subprocess.run(command, cwd=_ROOT, env=environment, stdout=2, check=False)
        if completed.returncode not in (0, 1):  # 0: all passed, 1: some failed
            arguments = " ".join([*tests, *selection])
            raise UserError(f"pytest exited with status {completed.returncode}: {arguments}")
        return read_report(report)


def read_report(report: Path) -> Outcome:
    """Reads a JUnit report of pytest."""
    about = measurements.about()
    records, failed = [], []
    for case in ElementTree.parse(report).iter("testcase"):
        if case.find("failure") is not None or case.find("error") is not None:
            failed.append(case.get("name", ""))
        records += [
            about | json.loads(entry.get("value", ""))
            for entry in case.iter("property")
            if entry.get("name") == "measured"
        ]
    return Outcome(records, failed)
