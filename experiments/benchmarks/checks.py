"""Measurements of tests: what a test compares with its tolerance is what a results page shows.

Such a test hands its numbers to pytest, `record_property("measured", <JSON object>)`, and knows
nothing of results; here they are collected.
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
CASES = flags.DEFINE_list("cases", [], "Parts of the names of cases to run; default: all.")


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What tests measured, and the names of those that did not pass."""

    records: list[dict[str, Any]]
    failed: list[str]

    def require_passed(self) -> None:
        """Raises a UserError that names the tests that did not pass, where there are any."""
        if self.failed:
            raise UserError(f"{len(self.failed)} tests failed: {', '.join(self.failed[:3])}")


def run(*tests: str, parts: Sequence[str] | None = None) -> Outcome:
    """Runs tests of the clone; their progress goes to standard error.

    Args:
      tests: files, or FILE::TEST, relative to the root of the clone.
      parts: of the names of the tests to run; None: as --cases says; empty: all.

    Raises:
      UserError: no test could be run.
    """
    if importlib.util.find_spec("pytest") is None:
        raise UserError("pytest: not installed; pip install -r requirements-dev.txt in the clone")
    chosen = CASES.value if parts is None else parts
    selection = ["-k", " or ".join(chosen)] if chosen else []
    # By which CI, short of time, skips slow tests.
    environment = {name: x for name, x in os.environ.items() if name != "SLOW_TESTS_UNTIL"}
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder, "report.xml")
        command = [sys.executable, "-m", "pytest", *tests, *selection]
        command += [f"--junitxml={report}", "-o", "junit_family=xunit1"]
        ended = subprocess.run(command, cwd=_ROOT, env=environment, stdout=2, check=False)
        if ended.returncode not in (0, 1):  # all passed, or some did not
            arguments = " ".join([*tests, *selection])
            raise UserError(f"pytest ended with {ended.returncode}: {arguments}")
        return collected(report)


def collected(report: Path) -> Outcome:
    """Returns what a JUnit report of pytest says."""
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
