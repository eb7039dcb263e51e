"""The reliability benchmark finds what it is there for; in Triton's interpreter where there is no GPU."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch
from psa_pack.psa_core import TokenLayout
from psa_pack.psa_core.capability import reason_against

pytest.importorskip("triton", reason="Triton is not installed")

from benchmarks import reliability

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
LAYOUT = TokenLayout((2, 5, 7), video_start=3)

pytestmark = pytest.mark.skipif(
    (reason := reason_against("triton", torch.device(DEVICE), torch.float32, 64)) is not None, reason=str(reason)
)


def test_a_shape_passes() -> None:
    variant = reliability.VARIANTS[4]
    inputs = reliability.make_inputs(random.Random(0), variant, LAYOUT)
    share, wrong = reliability.compare(variant, LAYOUT, *inputs)
    assert wrong == []
    assert 0 < share <= 1


def test_rows_that_nothing_is_written_to_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    variant = reliability.VARIANTS[4]
    inputs = reliability.make_inputs(random.Random(0), variant, LAYOUT)
    attend = reliability.triton.attend

    def attend_but_one_row(prepared: object, selection: object, out: torch.Tensor) -> None:
        last = out[:, :, -1].clone()
        attend(prepared, selection, out)
        out[:, :, -1] = last

    monkeypatch.setattr(reliability.triton, "attend", attend_but_one_row)
    _, wrong = reliability.compare(variant, LAYOUT, *inputs)
    assert any(text.startswith("relative error nan") for text in wrong)
    assert "the result depends on memory that nothing was written to" in wrong


def test_without_a_sanitizer_the_reason_is_said() -> None:
    assert reliability.sanitize("memcheck", None, 1) == {
        "state": "not run",
        "reason": "compute-sanitizer is not installed",
    }


@pytest.mark.parametrize(
    ("said", "code", "state"),
    [
        ("71 passed, 3 deselected in 60.1s\n========= ERROR SUMMARY: 0 errors", 0, "passed"),
        ("71 passed, 3 deselected in 60.1s\n========= ERROR SUMMARY: 2 errors", 99, "failed"),
        ("1 failed, 70 passed in 60.1s\n========= ERROR SUMMARY: 0 errors", 1, "failed"),
        ("Target application terminated before first instrumented API call", 1, "not run"),
    ],
)
def test_what_a_sanitizer_says_of_the_tests(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, said: str, code: int, state: str
) -> None:
    monkeypatch.setattr(reliability, "DEVICE", "cuda")
    sanitizer = tmp_path / "sanitizer"
    sanitizer.write_text(f"#!/bin/sh\ncat <<'END'\n{said}\nEND\nexit {code}\n")
    sanitizer.chmod(0o755)
    part = reliability.sanitize("memcheck", str(sanitizer), 60, reliability.GPU_TESTS)
    assert part["state"] == state
    assert state != "passed" or part["tests"] == "71 passed, 3 deselected"
