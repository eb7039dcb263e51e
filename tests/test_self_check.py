"""The self-check finds a wrong kernel on its first call and says what to report."""

from __future__ import annotations

import platform
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from psa_pack.psa_core import PSAConfig
from psa_pack.psa_core.backends import resolve
from psa_pack.psa_core.capability import reason_against
from psa_pack.psa_core.self_check import SelfCheckFailed, check_once, self_check

CPU = torch.device("cpu")
Step = Callable[..., Any]

pytestmark = [
    pytest.mark.interpreter,
    pytest.mark.skipif((reason := reason_against("triton", CPU, torch.float32, 64)) is not None, reason=str(reason)),
]


@pytest.fixture(autouse=True)
def _check_anew() -> Iterator[None]:
    check_once.cache_clear()
    yield
    check_once.cache_clear()


def swap_rows(attend: Step) -> Step:
    def wrong(prepared: Any, selection: Any, out: torch.Tensor) -> None:
        attend(prepared, selection, out)
        out.copy_(out.unflatten(2, (-1, 2)).flip(3).flatten(2, 3))

    return wrong


def lose_scale(attend: Step) -> Step:
    return lambda prepared, selection, out: attend(replace(prepared, scale=1.0), selection, out)


def halve(attend: Step) -> Step:
    def wrong(prepared: Any, selection: Any, out: torch.Tensor) -> None:
        attend(prepared, selection, out)
        out.mul_(0.5)

    return wrong


def lose_last_values(prepare: Step) -> Step:
    def wrong(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *others: Any) -> Any:
        v = v.clone()
        v[:, :, -16:] = 0
        return prepare(q, k, v, *others)

    return wrong


def take_all_exactly(select: Step) -> Step:
    def wrong(prepared: Any, importance: Any) -> Any:
        return select(replace(prepared, config=replace(prepared.config, error_weight=0.0)), importance)

    return wrong


FAULTS = {
    "an output row goes to its neighbour": ("attend", swap_rows),
    "the softmax scale is lost": ("attend", lose_scale),
    "the weights' sum is wrong": ("attend", halve),
    "the last tokens do not count": ("prepare", lose_last_values),
    "everything is exact": ("select", take_all_exactly),
}


def test_right_kernels_pass() -> None:
    self_check(CPU, torch.float32, 64, "triton", PSAConfig(error_weight=0.0017))


@pytest.mark.parametrize(("step", "spoil"), FAULTS.values(), ids=FAULTS)
def test_a_wrong_kernel_is_found_on_its_first_call(
    step: str, spoil: Callable[[Step], Step], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("psa_pack.psa_core.self_check.GRID", (5, 8, 9))  # few tokens: the interpreter is slow
    backend = resolve("triton", torch.zeros(1, 1, 1, 64))
    monkeypatch.setattr(backend, step, spoil(getattr(backend, step)))
    with pytest.raises(SelfCheckFailed) as found:
        self_check(CPU, torch.float32, 64, "triton", PSAConfig(error_weight=0.0017))
    said = str(found.value)
    assert said.startswith("self-check of backend triton on cpu, torch.float32, head dim 64: ")
    assert "; please report this line as a bug of PSA Attention (torch " in said
    for fact in (torch.__version__, "Triton 3.", platform.system()):
        assert fact in said
