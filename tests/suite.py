"""All tests that need no GPU, then those whose result depends on ComfyUI once more with a newer one, if one lies here.

    .venv/bin/python tests/suite.py [arguments of pytest]    (make test)

COMFYUI_PATH names the first ComfyUI. The newer one is COMFYUI_NEWEST's, else the one at comfy-cli's default place,
~/comfy/ComfyUI. A copy of it runs, so that nothing in it is touched, in an environment that adds to .venv what it needs
besides. The tests come in a random order, whose seed pytest prints; `--randomly-seed=N` repeats it. The last line sums
up in pytest's own format.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import time
import venv
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from xml.etree import ElementTree

from compatibility import python, site_packages
from pack import ROOT, comfyui_version

sys.path.append(str(ROOT / "demo"))

from install import requirement_lines

DEFAULT_PLACE = Path.home() / "comfy" / "ComfyUI"
COPY = ROOT / ".comfyui-newest"
ENVIRONMENT = ROOT / ".venv-comfyui-newest"
NOT_COPIED = shutil.ignore_patterns(
    ".*", "__pycache__", "models", "input", "output", "temp", "user", "custom_nodes", "venv*", "extra_model_paths.yaml"
)
# A file is one worker's, for its servers; files come in the order in which they are collected.
WORKERS = ("-n", "logical", "--dist", "loadfile", "--no-loadscope-reorder")
NOTHING_CHOSEN = 5


@dataclass(frozen=True)
class Run:
    """One call of pytest.

    Args:
        comfyui: Source folder of the ComfyUI that it has.
        python: Of the environment that it runs in.
        chosen: The mark of its tests, as pytest's ``-m`` takes it.
    """

    comfyui: Path
    python: str
    chosen: str


def main() -> int:
    """Run and sum up; 1 if a test failed or pytest could not run."""
    began, runs = time.monotonic(), [Run(Path(os.environ["COMFYUI_PATH"]), sys.executable, "not gpu")]
    newest = find_newest()
    if newest is not None and newest.resolve() != runs[0].comfyui.resolve():
        install(newest)
        runs.append(Run(COPY, python(ENVIRONMENT), "comfyui and not gpu"))
    counts: Counter[str] = Counter()
    statuses, lines = [], []
    for run in runs:
        status, counted = run_tests(run, sys.argv[1:])
        statuses.append(status)
        counts += counted
        lines.append(f"with ComfyUI {comfyui_version(run.comfyui)}: {said(counted)}, pytest's exit status {status}")
    if newest is None:
        lines.append(f"no newer ComfyUI: there is none in {DEFAULT_PLACE}, and COMFYUI_NEWEST names none")
    print(*lines, sep="\n")
    print(f" {said(counts)} in {time.monotonic() - began:.2f}s ".center(80, "="), flush=True)
    ran = [status for status in statuses if status != NOTHING_CHOSEN]
    return max(ran, default=NOTHING_CHOSEN)


def find_newest() -> Path | None:
    """The newer ComfyUI's source folder, if there is one.

    Raises:
        SystemExit: COMFYUI_NEWEST names a folder that is none.
    """
    named = os.environ.get("COMFYUI_NEWEST")
    newest = Path(named) if named else DEFAULT_PLACE
    if (newest / "main.py").is_file():
        return newest
    if named:
        raise SystemExit(f"COMFYUI_NEWEST: {newest} has no main.py")
    return None


def install(newest: Path) -> None:
    """Copy a ComfyUI, and make the environment that it runs in; quick where that is there."""
    shutil.rmtree(COPY, ignore_errors=True)
    shutil.copytree(newest, COPY, ignore=NOT_COPIED)
    wanted = requirement_lines(COPY / "requirements.txt")
    base = Path(sys.prefix)
    done = ENVIRONMENT / f".installed-{hashlib.sha256(repr((wanted, str(base))).encode()).hexdigest()[:16]}"
    if done.exists():
        return
    print(f"installing what ComfyUI {comfyui_version(COPY)} needs into {ENVIRONMENT.name}", flush=True)
    shares = "include-system-site-packages = true" in (base / "pyvenv.cfg").read_text("utf-8")
    venv.create(ENVIRONMENT, with_pip=True, clear=True, system_site_packages=shares)
    # behind its own packages, those of the tests
    (site_packages(ENVIRONMENT) / "tests.pth").write_text(f"{site_packages(base)}\n", encoding="utf-8")
    command = [python(ENVIRONMENT), "-m", "pip", "--disable-pip-version-check", "install", "--quiet", *wanted]
    subprocess.run(command, check=True)
    done.touch()


def run_tests(run: Run, arguments: list[str]) -> tuple[int, Counter[str]]:
    """Pytest's exit status, and how many tests passed, failed, ... ."""
    environment = os.environ | {"COMFYUI_PATH": str(run.comfyui)}
    with TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        command = [run.python, "-m", "pytest", "-m", run.chosen, *WORKERS, f"--junit-xml={report}", *arguments]
        status = subprocess.run(command, cwd=ROOT, env=environment).returncode
        return status, count(report) if report.exists() else Counter()


def count(report: Path) -> Counter[str]:
    """How many tests of a JUnit report passed, failed, ... ."""
    numbers: Counter[str] = Counter()
    for suite in ElementTree.parse(report).iter("testsuite"):
        tests, failed, errors, skipped = (int(suite.get(key, 0)) for key in ("tests", "failures", "errors", "skipped"))
        numbers += Counter(passed=tests - failed - errors - skipped, failed=failed, errors=errors, skipped=skipped)
    return numbers


def said(counts: Counter[str]) -> str:
    """Counts as pytest's closing line has them."""
    parts = [f"{counts[kind]} {kind}" for kind in ("failed", "passed", "skipped", "errors") if counts[kind]]
    return ", ".join(parts) or "no tests ran"


if __name__ == "__main__":
    sys.exit(main())
