"""Several models, patches and threads at once: every run gives the bits that it gives alone."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from runs import reasons, record
from test_nodes_patch import SPARSE, patch, preset
from tiny_wan import BLOCKS, make_model, sample


@pytest.fixture(scope="module", autouse=True)
def hasty_switches(one_thread: None) -> Iterator[None]:
    """Each of two sampling threads computes alone; the interpreter changes between them as often as it can."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(before)


@pytest.fixture(scope="module")
def models(comfyui: Path) -> tuple[Any, Any]:
    return make_model(), make_model()


def at_once(*runs: Callable[[], Tensor]) -> list[Tensor]:
    """Results of functions that start together in threads of their own."""
    start = threading.Barrier(len(runs))

    def wait_and(run: Callable[[], Tensor]) -> Tensor:
        start.wait(timeout=60)
        return run()

    with ThreadPoolExecutor(len(runs)) as pool:
        return list(pool.map(wait_and, runs))


def counts(patched: Any) -> tuple[Any, ...]:
    run = record(patched)
    return run.outcome, run.steps, run.sparse_calls, reasons(run), run.other_calls, run.density


def test_two_models_with_different_presets_in_one_graph(models: tuple[Any, Any]) -> None:
    first, second = patch(models[0], **SPARSE), patch(models[1], "fast", **SPARSE | {"error_weight": 0.01})
    alone = [(sample(model), counts(model)) for model in (first, second)]
    assert alone[0][1] != alone[1][1]
    for _ in range(2):
        for model, (latent, expected) in zip((second, first), reversed(alone), strict=True):
            assert torch.equal(sample(model), latent)
            assert counts(model) == expected


def test_one_model_patched_in_two_ways(models: tuple[Any, Any]) -> None:
    """Two patch nodes after one loader: neither knows of the other."""
    first, second = patch(models[0], **SPARSE), patch(models[0], **SPARSE, dense_blocks="0")
    alone = sample(first), sample(second)
    assert not torch.equal(*alone)
    assert reasons(record(first)) == {}
    assert reasons(record(second)) == {"in dense_blocks": 4}
    assert torch.equal(sample(first), alone[0])
    assert torch.equal(sample(second), alone[1])


@pytest.mark.parametrize("between", ["clone", "off", "the plain model", "another patch"])
def test_what_happens_between_two_runs_changes_neither(models: tuple[Any, Any], between: str) -> None:
    patched = patch(models[0], **SPARSE)
    before = sample(patched)
    plain = sample(models[0])
    others = {
        "clone": lambda: (patched.clone(), before),
        "off": lambda: (patch(patched, "off"), plain),
        "the plain model": lambda: (models[0], plain),
        "another patch": lambda: (patch(patched, **SPARSE | {"error_weight": 0.0}), None),
    }
    other, expected = others[between]()
    out = sample(other)
    assert expected is None or torch.equal(out, expected)
    assert torch.equal(sample(patched), before)
    assert counts(patched)[:3] == ("finished", 4, 4 * BLOCKS)


def test_two_threads_sampling_at_once(models: tuple[Any, Any]) -> None:
    first, second = patch(models[0], **SPARSE), patch(models[1], "fast", **SPARSE | {"error_weight": 0.01})
    alone = [(sample(model), counts(model)) for model in (first, second)]
    for _ in range(3):
        together = at_once(lambda: sample(first), lambda: sample(second))
        for model, out, (latent, expected) in zip((first, second), together, alone, strict=True):
            assert torch.equal(out, latent)
            assert counts(model) == expected


def test_calls_of_one_run_from_several_threads_are_all_counted(comfyui: Path) -> None:
    """As ComfyUI's multi-GPU work units make them: one session, a thread per device."""
    from psa_pack.nodes.gate import PatchSettings
    from psa_pack.nodes.session import Session
    from psa_pack.nodes.words import Words
    from psa_pack.psa_core import TokenLayout

    layout, threads, calls = TokenLayout((1, 4, 5)), 4, 40
    settings = PatchSettings("test", (), preset(), frozenset(), "reference", False)
    session = Session(settings, lambda p: 1 - p, lambda text: None)
    q = torch.randn(1, 2, layout.tokens, 64, generator=torch.Generator().manual_seed(0))
    alone = session_output(session, q, layout)

    def work() -> Tensor:
        for _ in range(calls):
            out = session_output(session, q, layout)
            session.count_dense(Words.of("said", text="by the test"))
            session.count_other()
            assert torch.equal(out, alone)
        return out

    at_once(*[work] * threads)
    run = session.finish("finished")
    total = threads * calls
    assert (run.sparse_calls, reasons(run), run.other_calls) == (total + 1, {"by the test": total}, total)
    assert run.density == 1.0  # a lone block is worth its exact rows
    assert (run.steps, run.sparse_steps) == (1, 1)


def session_output(session: Any, q: Tensor, layout: Any) -> Tensor:
    session.begin_model_call(0.5, layout)
    out = session.attend(q, q, q, layout, preset().config, None, 0, dense=lambda: q)
    assert out is not None
    return out


def test_multi_gpu_work_units_give_the_same_bits(models: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """ComfyUI's own thread pool, with the CPU as two devices."""
    pytest.importorskip("comfy.multigpu", reason="this ComfyUI has no multi-GPU work units")
    alone = patch(models[0], **SPARSE)
    run = {"cfg": 6.0, "negative_context": 100}  # one condition a device
    expected = sample(alone, **run)
    patched = patch(models[0], **SPARSE)
    other = make_model()
    other.load_device, other.is_multigpu_base_clone = torch.device("cpu", 0), True
    patched.set_additional_models("multigpu", [other])
    monkeypatch.setattr(type(patched), "match_multigpu_clones", lambda self: None)  # no loader to copy it from
    other.wrappers, other.model_options = patched.wrappers, patched.model_options
    threads = seen_threads(monkeypatch)
    assert torch.equal(sample(patched, **run), expected)
    assert counts(patched) == counts(alone)
    assert len(threads) == 2


def seen_threads(monkeypatch: pytest.MonkeyPatch) -> set[int]:
    """Threads in which attention is computed from now on."""
    from psa_pack.nodes.session import Session

    threads: set[int] = set()
    attend = Session.attend

    def noted(self: Any, *args: Any) -> Any:
        threads.add(threading.get_ident())
        return attend(self, *args)

    monkeypatch.setattr(Session, "attend", noted)
    return threads
