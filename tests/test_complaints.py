"""What users of attention patches for video models complain of, and that they need not here.

Each complaint is a function that fails where a user would complain, with the public threads that it was read in, and
with a way to take its cure out of the pack. Both are tested: with the cure nobody complains, without it the complaint
is back.

The threads are in the repositories Comfy-Org/ComfyUI, kijai/ComfyUI-WanVideoWrapper, kijai/ComfyUI-KJNodes,
kijai/ComfyUI-SolAttn_triton, woct0rdho/ComfyUI-RadialAttn, thu-ml/SpargeAttn, H3-Optimizations and ComfyUI-bleh.
"""

from __future__ import annotations

import asyncio
import logging
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psa_pack
import pytest
import torch
from psa_pack.psa_core import PSAConfig, TokenLayout, psa_attention
from psa_pack.psa_core.capability import reason_against
from psa_pack.psa_core.presets import load_presets
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from conftest import ROOT
from runs import reasons, record
from test_nodes_patch import EVERYWHERE, OVERRIDE, SPARSE, distance, patch
from tiny_wan import BLOCKS, TOKENS, make_model, sample

pytestmark = pytest.mark.usefixtures("one_thread")

EXACT = {**EVERYWHERE, "error_weight": 0.0}


@pytest.fixture(scope="module")
def model(comfyui: Path) -> Any:
    return make_model()


@dataclass(frozen=True)
class Complaint:
    """One complaint.

    Args:
        threads: Where it was read.
        provoke: Does what the users did, on a Wan model; fails where they would complain.
        take_cure_out: Undoes what the pack does against it.
    """

    threads: str
    provoke: Callable[[Any], None]
    take_cure_out: Callable[[pytest.MonkeyPatch], None]


COMPLAINTS: dict[str, Complaint] = {}


def complaint(
    threads: str, without: Callable[[pytest.MonkeyPatch], None]
) -> Callable[[Callable[[Any], None]], Callable[[Any], None]]:
    """Put a function among the complaints, under its own name."""

    def add(provoke: Callable[[Any], None]) -> Callable[[Any], None]:
        COMPLAINTS[provoke.__name__.replace("_", " ")] = Complaint(threads, provoke, without)
        return provoke

    return add


def trust_every_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    from psa_pack.nodes import session

    monkeypatch.setattr(session, "self_check", lambda *args: None)


@complaint(
    "ComfyUI#7020, #8573, #9077; WanVideoWrapper#2015, #1731; SpargeAttn#33",
    without=trust_every_kernel,
)
def black_or_noisy_video(model: Any) -> None:
    """A kernel that is wrong on this machine is found before it is used."""
    from psa_pack.psa_core import self_check
    from psa_pack.psa_core.backends import reference

    attend, dense, patched = reference.attend, sample(model), patch(model, **SPARSE)
    for wrong in (float("nan"), 0.5):

        def attend_wrongly(prepared: Any, codes: Any, out: Tensor, wrong: float = wrong) -> None:
            attend(prepared, codes, out)
            out.mul_(wrong)

        self_check.check_once.cache_clear()
        with pytest.MonkeyPatch.context() as broken:
            broken.setattr(reference, "attend", attend_wrongly)
            out = sample(patched)
        self_check.check_once.cache_clear()
        assert torch.equal(out, dense)
        (reason,) = reasons(record(patched))
        assert "self-check of backend reference" in reason


def let_compile_trace_everything(monkeypatch: pytest.MonkeyPatch) -> None:
    from psa_pack.nodes import attention_patch
    from psa_pack.nodes.attention_patch import AttentionPatch
    from psa_pack.nodes.override import AttentionOverride

    for owner, name in (
        (AttentionPatch, "around_model_call"),
        (attention_patch, "_begin_model_call"),
        (AttentionOverride, "__call__"),
    ):
        monkeypatch.setattr(owner, name, getattr(owner, name)._torchdynamo_orig_callable)


@complaint("KJNodes#449; ComfyUI#13599", without=let_compile_trace_everything)
def torch_compile_breaks_or_freezes_it(model: Any) -> None:
    """Compiled, the first half of the steps is dense and the second sparse, as without; no graph holds any of it."""
    from comfy_api.torch_helpers import set_torch_compile_wrapper

    traced: list[str] = []

    def note_graph(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
        traced.extend(node.stack_trace or "" for node in graph.graph.nodes)
        return graph.forward

    plain = patch(model, **SPARSE | {"start_percent": 0.5})
    expected = sample(plain)
    compiled = patch(model, **SPARSE | {"start_percent": 0.5})
    torch._dynamo.reset()
    set_torch_compile_wrapper(compiled, backend=note_graph)
    try:
        assert distance(sample(compiled), expected) < 1e-5
    finally:
        torch._dynamo.reset()
    assert record(compiled).sparse_calls == record(plain).sparse_calls == 2 * BLOCKS
    assert record(compiled).dense_calls == record(plain).dense_calls
    assert any("comfy" in stack for stack in traced)
    assert not any(str(ROOT / folder) + os.sep in stack for stack in traced for folder in ("nodes", "psa_core"))


def look_for_no_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    from psa_pack.psa_core import backends

    monkeypatch.setattr(backends, "reason_against", lambda *args: None)


@complaint("SolAttn_triton#15; ComfyUI#12698; WanVideoWrapper#92", without=look_for_no_triton)
def without_triton_the_import_fails_and_the_nodes_are_gone(model: Any) -> None:
    """The nodes are there, and a run says what to install and renders."""
    triton = take_out("triton")
    sys.modules["triton"] = None  # type: ignore[assignment]  # an import of it fails
    try:
        ours, attributes = take_out("psa_pack."), dict(vars(psa_pack))
        try:
            nodes = asyncio.run(asyncio.run(psa_pack.comfy_entrypoint()).get_node_list())
        finally:
            take_out("psa_pack.")
            sys.modules.update(ours)
            vars(psa_pack).update(attributes)
        assert {"PSAAttentionPatch", "PSAPresetLoader"} <= {node.GET_SCHEMA().node_id for node in nodes}
        patched = patch(model, **SPARSE | {"backend": "triton"})
        assert torch.equal(sample(patched), sample(model))
        (reason,) = reasons(record(patched))
        assert "Triton is not installed; install the triton" in reason
    finally:
        del sys.modules["triton"]
        sys.modules.update(triton)


def take_out(prefix: str) -> dict[str, Any]:
    """Modules that begin like this, which Python now has not imported."""
    return {name: sys.modules.pop(name) for name in list(sys.modules) if name.startswith(prefix)}


def count_whole_patches_only(monkeypatch: pytest.MonkeyPatch) -> None:
    from psa_pack.nodes.models import wan

    def whole(shape: Any, patch_size: Any) -> tuple[int, ...]:
        return tuple(extent // size for extent, size in zip(shape, patch_size, strict=True))

    monkeypatch.setattr(wan, "token_grid", whole)


@complaint("WanVideoWrapper#826, #852; RadialAttn#5, #9", without=count_whole_patches_only)
def the_resolution_must_divide_by_something(model: Any) -> None:
    """Odd widths and heights, one frame, fewer tokens than a block."""
    for latent in ((1, 2, 3), (1, 10, 14), (5, 15, 13), (2, 31, 17)):
        patched = patch(model, **EXACT)
        assert distance(sample(patched, latent=latent, steps=2), sample(model, latent=latent, steps=2)) < 1e-5
        assert record(patched).sparse_calls == 2 * BLOCKS
        assert record(patched).dense_calls == {}


def say_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    from psa_pack.nodes import session

    monkeypatch.setattr(session._log, "info", lambda *args: None)
    monkeypatch.setattr(session.Session, "_say", lambda *args: None)


@complaint("H3-Optimizations#76", without=say_nothing)
def nobody_knows_whether_it_is_on(model: Any) -> None:
    """The node and the log tell how many calls were sparse, how many dense and why, their density and the time."""
    sent: list[str] = []
    server = SimpleNamespace(instance=SimpleNamespace(send_progress_text=lambda text, node: sent.append(text)))
    with pytest.MonkeyPatch.context() as shown, seen_log() as lines:
        from psa_pack.nodes.attention_patch import PSAAttentionPatch

        shown.setitem(sys.modules, "server", SimpleNamespace(PromptServer=server))
        node = type("WithHidden", (PSAAttentionPatch,), {"hidden": SimpleNamespace(unique_id="7")})
        sample(node.execute(model, "balanced", **SPARSE | {"start_percent": 0.5}).args[0])
    assert len(lines) == 1
    for fact in ("4 sparse calls (mean density 0.", "4 dense calls (4 before start_percent 0.5)", "finished after"):
        assert fact in lines[0]
    for fact in (
        "2 of 4 steps sparse\nmean density 0.",
        "dense calls: 4\nbefore start_percent 0.5\n",
        "finished after",
    ):
        assert fact in sent[-1]


@contextmanager
def seen_log() -> Iterator[list[str]]:
    """The pack's log lines."""
    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda entry: lines.append(entry.getMessage())  # type: ignore[method-assign]
    log = logging.getLogger("psa_pack")
    before = log.level
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    try:
        yield lines
    finally:
        log.removeHandler(handler)
        log.setLevel(before)


def chain_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    from psa_pack.nodes import attention_patch

    override = attention_patch.AttentionOverride
    monkeypatch.setattr(
        attention_patch, "AttentionOverride", lambda session, sequence, _: override(session, sequence, None)
    )


@complaint("SolAttn_triton#6", without=chain_nothing)
def another_attention_node_has_to_come_first_or_last(model: Any) -> None:
    """One that assigns its override without chaining works beside PSA in either order, and gets what stays dense."""
    settings = SPARSE | {"start_percent": 0.5}
    expected = sample(patch(model, **settings))
    for other_first in (True, False):
        calls: list[int] = []

        def other(func: Callable[..., Tensor], *args: Any, calls: list[int] = calls, **kwargs: Any) -> Tensor:
            calls.append(args[1].shape[1])
            return func(*args, **kwargs)

        source = model.clone()
        if other_first:
            source.model_options["transformer_options"][OVERRIDE] = other
        both = patch(source, **settings)
        both.model_options["transformer_options"][OVERRIDE] = other
        assert torch.equal(sample(both), expected)
        assert record(both).sparse_calls == 2 * BLOCKS
        assert sorted(calls) == [77] * 4 * BLOCKS + [TOKENS] * 2 * BLOCKS


def patch_the_model_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    from comfy.model_patcher import ModelPatcher

    monkeypatch.setattr(ModelPatcher, "clone", lambda self: self)


@complaint("KJNodes#269", without=patch_the_model_itself)
def the_patch_stays_on_after_bypass_or_hits_another_model(_: Any) -> None:
    """After a sparse run, the same model and another one without the node are what they were."""
    import comfy.ldm.modules.attention as attention
    import comfy.ldm.wan.model as wan

    mine, another = make_model(), make_model()
    before, functions = sample(mine), (dict(vars(attention)), dict(vars(wan)))
    patched = patch(mine, **SPARSE)
    sparse = sample(patched)
    assert distance(sparse, before) > 1e-4
    assert torch.equal(sample(mine), before)
    assert torch.equal(sample(another), before)
    assert torch.equal(sample(patch(patched, "off")), before)
    assert torch.equal(sample(patched), sparse)
    assert mine.model_options == another.model_options == {"transformer_options": {}}
    assert (dict(vars(attention)), dict(vars(wan))) == functions


def go_sparse_at_any_length(monkeypatch: pytest.MonkeyPatch) -> None:
    from psa_pack.nodes.session import Session

    monkeypatch.setattr(Session, "admit", lambda self, *args: self.settings.preset.config)


@complaint("SolAttn_triton#10, #22; RadialAttn#6", without=go_sparse_at_any_length)
def it_is_slower_than_before(model: Any) -> None:
    """Where sparse would not pay, a run makes the tensor operations that it makes without the node, and no others.

    But for reading the noise level, which is three to six operations a model call, none of them in a block.
    """
    for name in ("balanced", "quality", "fast"):
        patched = patch(model, name, backend="reference")
        with Operations() as without:
            dense = sample(model)
        with Operations() as with_node:
            assert torch.equal(sample(patched), dense)
        assert record(patched).sparse_calls == 0
        assert 0 <= with_node.count - without.count <= 4 * 6
        schedule = load_presets(ROOT / "presets" / "wan2.1_1.3b.yaml")[name].schedule
        assert schedule.min_tokens > TOKENS


class Operations(TorchDispatchMode):
    """Counts the tensor operations that run in it."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += 1
        return func(*args, **(kwargs or {}))


def take_all_heads_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    from psa_pack.psa_core import attention

    monkeypatch.setattr(attention, "_attend_in_chunks", lambda *args: attention._attend_chunk(*args))


@complaint("ComfyUI#16144, #16175; SolAttn_triton#20", without=take_all_heads_at_once)
def it_runs_out_of_memory(model: Any) -> None:
    """Memory for one head only changes no bit; no memory at all makes the run dense."""
    from psa_pack.nodes import session
    from psa_pack.psa_core.backends import reference

    prepare, paused, patched = reference.prepare, [], patch(model, **SPARSE)
    expected = sample(patched)

    @contextmanager
    def pause() -> Iterator[None]:
        paused.append(True)
        try:
            yield
        finally:
            paused.pop()

    def prepare_heads(most: int) -> Callable[..., Any]:
        def limited(q: Tensor, *args: Any) -> Any:
            assert paused  # ComfyUI's recorded allocations cannot take ours
            if q.shape[1] > most:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return prepare(q, *args)

        return limited

    for most, out in ((1, expected), (0, sample(model))):
        with pytest.MonkeyPatch.context() as limited:
            limited.setattr(session, "pause_malloc_graph", pause)
            limited.setattr(reference, "prepare", prepare_heads(most))
            assert torch.equal(sample(patched), out)
        assert paused == []
        assert record(patched).sparse_calls == (4 * BLOCKS if most else 0)


def gate_by_counting_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    """As those do who call the first so many model calls warm-up: two conditions, half of ten steps."""
    from psa_pack.nodes.session import Session
    from psa_pack.nodes.words import Words

    begin = Session.begin_model_call

    def counted(self: Any, *args: Any, **kwargs: Any) -> None:
        self.calls = getattr(self, "calls", 0) + 1
        begin(self, *args, **kwargs)

    monkeypatch.setattr(Session, "begin_model_call", counted)
    monkeypatch.setattr(
        Session,
        "admit",
        lambda self, *args: self.settings.preset.config if self.calls >= 10 else Words.of("dense_block"),
    )


@complaint("WanVideoWrapper#1741", without=gate_by_counting_calls)
def two_experts_and_split_samplers_are_gated_wrongly(model: Any) -> None:
    """Sparse from the middle of the sampling on, however it is cut, whoever samples, however conditions are batched."""
    experts = [patch(weights, **SPARSE | {"start_percent": 0.5}) for weights in (model, make_model())]
    for run in ({"cfg": 1.0}, {"cfg": 6.0}, {"cfg": 6.0, "negative_context": 100}):
        for cut in (3, 5, 8):
            parts = []
            for expert, (start, last) in zip(experts, ((0, cut), (cut, 10)), strict=True):
                sample(expert, steps=10, start_step=start, last_step=last, **run)
                parts.append((record(expert).steps, record(expert).sparse_steps))
            assert parts == [(cut, max(cut - 5, 0)), (10 - cut, 10 - max(cut, 5))]


def know_every_argument(monkeypatch: pytest.MonkeyPatch) -> None:
    from psa_pack.nodes.override import AttentionOverride

    original = AttentionOverride.__call__

    def strict(
        self: Any, func: Any, q: Any, k: Any, v: Any, heads: int, mask: Any = None, transformer_options: Any = None,
        _inside_attn_wrapper: bool = True,
    ) -> Tensor:  # fmt: skip
        return original(self, func, q, k, v, heads, mask, transformer_options=transformer_options)

    monkeypatch.setattr(AttentionOverride, "__call__", strict)


@complaint("RadialAttn#14, #15, #17", without=know_every_argument)
def the_next_comfyui_breaks_it(model: Any) -> None:
    """Arguments that today's ComfyUI does not have yet, of attention and of the model: known ones stay at work."""
    import comfy.ldm.wan.model as wan

    attend, forward, expected = wan.optimized_attention, wan.WanModel.forward, sample(patch(model, **SPARSE))
    for new, sparse in ({"low_precision_attention": False}, True), ({"of_tomorrow": 3}, False):

        def attend_anew(*args: Any, new: dict[str, Any] = new, **kwargs: Any) -> Tensor:
            # its own functions know the argument, of course
            func = attend.__wrapped__ if hasattr(attend, "__wrapped__") else attend
            override = kwargs["transformer_options"].get(OVERRIDE)
            if override is None:
                return attend(*args, **kwargs)

            def knowing(*args: Any, **kwargs: Any) -> Tensor:
                return func(*args, **{name: value for name, value in kwargs.items() if name not in new})

            return override(knowing, *args, **kwargs, **new, _inside_attn_wrapper=True)

        def forward_anew(self: Any, *args: Any, of_tomorrow: Any = 3, **kwargs: Any) -> Tensor:
            return forward(self, *args, **kwargs)

        patched = patch(model, **SPARSE)
        with pytest.MonkeyPatch.context() as newer:
            newer.setattr(wan, "optimized_attention", attend_anew)
            newer.setattr(wan.WanModel, "forward", forward_anew)
            assert torch.equal(sample(patched), expected if sparse else sample(model))
        reason = "the call has arguments that PSA does not know (of_tomorrow)"
        assert reasons(record(patched)) == ({} if sparse else {reason: 4 * BLOCKS})


def show_everything(monkeypatch: pytest.MonkeyPatch) -> None:
    from psa_pack.nodes import attention_patch

    inputs = attention_patch._advanced_inputs

    def shown() -> list[Any]:
        widgets = inputs()
        for widget in widgets:
            widget.extra_dict.pop("advanced")
        return widgets

    monkeypatch.setattr(attention_patch, "_advanced_inputs", shown)


@complaint("bleh#17", without=show_everything)
def too_many_knobs_to_tune_for_each_model(model: Any) -> None:
    """Beside the model two inputs show, neither needs a choice, and the numbers are the model's own."""
    from psa_pack.nodes.attention_patch import AttentionPatch, PSAAttentionPatch

    shown = [
        entry.id for entry in PSAAttentionPatch.define_schema().inputs if not (entry.extra_dict or {}).get("advanced")
    ]
    assert shown == ["model", "preset", "custom_preset"]
    (choice,) = [entry for entry in PSAAttentionPatch.define_schema().inputs if entry.id == "preset"]
    settings = AttentionPatch.find(patch(model, choice.default)).settings
    assert settings.preset == load_presets(ROOT / "presets" / "wan2.1_1.3b.yaml")["balanced"]


@pytest.mark.parametrize("name", COMPLAINTS)
def test_nobody_has_to_complain(model: Any, name: str) -> None:
    COMPLAINTS[name].provoke(model)


@pytest.mark.parametrize("name", COMPLAINTS)
def test_without_its_cure_the_complaint_is_back(model: Any, name: str) -> None:
    with pytest.MonkeyPatch.context() as uncured:
        COMPLAINTS[name].take_cure_out(uncured)
        with pytest.raises((AssertionError, TypeError)):
            COMPLAINTS[name].provoke(model)


# Black video has a second cause: half precision that overflows inside of a kernel. Its cure is in the kernel's code.
@pytest.mark.interpreter
@pytest.mark.skipif(
    (reason := reason_against("triton", torch.device("cpu"), torch.float32, 64)) is not None, reason=str(reason)
)
def test_black_video_because_half_precision_overflows() -> None:
    """ComfyUI#7020, #8573, #9077: a row whose largest logit is far from its neighbours' is computed again, rescaled."""
    layout = TokenLayout((2, 8, 8))
    q, k, v = torch.randn(3, 1, 1, 128, 64, generator=torch.Generator().manual_seed(0))
    k[:, :, layout.tokens // 2] *= 300  # one key far from the others, as models have
    q, k, v = (x.to(torch.float16) for x in (40 * q, k, v))
    out = psa_attention(q, k, v, layout=layout, config=PSAConfig(error_weight=0.0), backend="triton")
    logits = q.float() @ k.float().mT / 8
    # what a kernel has that rescales by each row's first keys only
    from_first = logits - logits[..., :64].amax(-1, keepdim=True)
    assert not from_first.exp().to(torch.float16).isfinite().all()
    assert (torch.softmax(logits, -1) @ v.float()).isfinite().all() and out.isfinite().all()
