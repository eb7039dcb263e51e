"""What a session decides, counts and lets go of."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

import pytest
import torch
from psa_pack.psa_core import PSAConfig, TokenLayout
from psa_pack.psa_core.presets import Preset
from psa_pack.psa_core.schedule import Schedule

from runs import reasons

LONG, SHORT = TokenLayout((1, 4, 5)), TokenLayout((1, 2, 5))


@pytest.fixture(autouse=True)
def _comfyui(comfyui: Path) -> None:
    """Every test here imports nodes."""


def session(**schedule: Any) -> Any:
    from psa_pack.nodes.gate import PatchSettings
    from psa_pack.nodes.session import Session

    preset = Preset("p", "f", "", "", PSAConfig(error_weight=0.0), Schedule(**schedule))
    settings = PatchSettings("f p", (), preset, frozenset(), "reference", False)
    return Session(settings, lambda percent: 1 - percent, lambda lines: None)


def attend(running: Any, layout: TokenLayout) -> Any:
    q = torch.randn(1, 2, layout.tokens, 64, generator=torch.Generator().manual_seed(0))
    return running.attend(q, q, q, layout, PSAConfig(error_weight=0.0), None, 0, dense=lambda: q)


def test_the_longest_sequence_of_a_run_is_told() -> None:
    running = session()
    for sigma, layout in ((0.5, SHORT), (0.4, LONG), (0.3, SHORT)):
        running.begin_model_call(sigma, layout)
    assert running.finish("finished").tokens == LONG.tokens


@pytest.mark.parametrize(("least", "is_sparse"), [(20, True), (21, False)])
def test_min_tokens_is_the_least_that_goes_sparse(least: int, is_sparse: bool) -> None:
    running = session(min_tokens=least)
    running.begin_model_call(0.5, LONG)
    assert isinstance(running.admit(LONG, None), PSAConfig) == is_sparse


def test_a_session_that_has_ended_holds_no_tensor() -> None:
    running = session()
    running.begin_model_call(0.5, LONG)
    attend(running, LONG)
    assert tensors_in(running)
    running.finish("finished")
    assert not tensors_in(running)


def tensors_in(thing: object) -> list[torch.Tensor]:
    """Tensors that something holds, its classes and modules apart."""
    seen, found, left = set(), [], [thing]
    while left:
        current = left.pop()
        if id(current) in seen or isinstance(current, type) or callable(current):
            continue
        seen.add(id(current))
        if isinstance(current, torch.Tensor):
            found.append(current)
        else:
            left += gc.get_referents(current)
    return found


def test_after_a_failure_of_the_run_the_device_is_asked_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    from psa_pack.nodes import tally

    asked = []
    monkeypatch.setattr(tally, "read_calls", lambda calls: asked.append(calls) or [])
    for outcome in ("failed", "interrupted"):
        running = session()
        running.begin_model_call(0.5, LONG)
        attend(running, LONG)
        record = running.finish(outcome)
        assert (record.outcome, record.sparse_calls, record.density) == (outcome, 1, None)
        assert bool(asked) == (outcome != "failed")
        assert not tensors_in(running)


def test_a_failure_is_the_reason_from_then_on() -> None:
    running = session()
    running.begin_model_call(0.5, LONG)
    q = torch.empty(1, 2, 20, 96)  # a head dim that no backend takes
    assert running.attend(q, q, q, LONG, PSAConfig(error_weight=0.0), None, 0, dense=lambda: q) is None
    reason = running.admit(LONG, None)
    assert "head dim 96" in str(reason)
    assert reasons(running.finish("finished")) == {str(reason): 1}
