"""Bad input gets an error that names the parameter, its value and what is allowed."""

from __future__ import annotations

import re
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from psa_pack.psa_core import PSAConfig, TokenLayout, psa_attention
from psa_pack.psa_core.backends import BackendUnavailable
from psa_pack.psa_core.capability import HEAD_DIMS, reason_against

LAYOUT = TokenLayout((2, 3, 4))
CONFIG = PSAConfig(error_weight=0.1)
RANKED = {
    "selection": "topk",
    "levels": (1, 2, 8, "skip"),
    "ranges": ((0, 0.1), (0.1, 0.2), (0.2, 0.6), (0.6, 1)),
}


def attend(**changes: Any) -> Any:
    q = torch.randn(1, 2, LAYOUT.tokens, 64)
    arguments: dict[str, Any] = {"q": q, "k": q, "v": q, "layout": LAYOUT, "config": CONFIG} | changes
    return psa_attention(arguments.pop("q"), arguments.pop("k"), arguments.pop("v"), **arguments)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"q": torch.randn(2, 24, 64)}, "q: shape (2, 24, 64) is not [B, H, N, D]"),
        ({"k": torch.randn(1, 2, 20, 64)}, "k: shape (1, 2, 20, 64) differs from q's"),
        ({"v": torch.randn(1, 2, 24, 64).half()}, "v: torch.float16 on cpu differs from q's torch.float32"),
        ({name: torch.randn(1, 2, 24, 96) for name in "qkv"}, "q: head dim 96 is not one of (64, 128)"),
        ({name: torch.ones(1, 2, 24, 64).int() for name in "qkv"}, "q: dtype torch.int32 is not one of"),
        ({name: torch.randn(1, 0, 24, 64) for name in "qkv"}, "no batch item or no head"),
        ({"layout": TokenLayout((2, 3, 5))}, "layout: 30 tokens, but q has 24"),
        ({"scale": float("nan")}, "scale: nan is not a positive number"),
        ({"backend": "cuda"}, "backend: 'cuda' is not one of auto, triton, reference"),
        ({"config": PSAConfig(error_weight=0.1, workspace_mib=1), "layout": TokenLayout((8, 10, 10)),
          **{name: torch.randn(1, 2, 800, 64) for name in "qkv"}},
         "workspace_mib: 1 is too small for one head; the least"),
    ],
)  # fmt: skip
def test_attention_refuses(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        attend(**changes)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "error_weight: None is not a number from 0 (dense) to 1e6"),
        ({"error_weight": -1}, "error_weight: -1 is not"),
        ({"error_weight": True}, "error_weight: True is not"),
        ({"error_weight": 0.1, "levels": (2, 4)}, "selection 'error' needs level 1"),
        ({"error_weight": 0.1, "levels": (1, "skip")}, "selection 'error' needs level 1 and cannot skip"),
        ({"error_weight": 0.1, "levels": (1, 3)}, "levels: 3 is not one of 1, 2, 4, 8, 'block', 'skip'"),
        ({"error_weight": 0.1, "levels": (1, 4, 2)}, "are not listed once each from fine to coarse"),
        ({"error_weight": 0.1, "levels": ()}, "is not a non-empty tuple"),
        ({"error_weight": 0.1, "ranges": ((0, 1),)}, "ranges: ((0, 1),) have no meaning with selection 'error'"),
        ({"error_weight": 0.1, "order": "morton"}, "order: 'morton' is not one of gilbert, tile, raster"),
        ({"error_weight": 0.1, "tile": (2, 2, 2)}, "tile: (2, 2, 2) has no meaning with order 'gilbert'"),
        ({"error_weight": 0.1, "order": "tile", "tile": (2, 0, 2)}, "tile: (2, 0, 2) is not three whole numbers"),
        ({"error_weight": 0.1, "key_block": 48}, "key_block: 48 is not one of 32, 64, 128"),
        ({"error_weight": 0.1, "query_block": 256}, "query_block: 256 is not one of 64, 128"),
        ({"error_weight": 0.1, "workspace_mib": 0}, "workspace_mib: 0 is not a whole number of MiB from 1 up"),
        ({"error_weight": 0.1, "variance_term": 1}, "variance_term: 1 is not true or false"),
        ({"selection": "best", "error_weight": 0.1}, "selection: 'best' is not one of error, topk, threshold"),
        ({"selection": "topk", "levels": (1, "skip"), "error_weight": 0.1, "ranges": ((0, 0.1), (0.1, 1))},
         "error_weight: 0.1 has no meaning with selection 'topk'"),
        ({"selection": "topk", "levels": (1, "skip")}, "ranges: None is not one (low, high) for each of the levels"),
        ({"selection": "topk", "levels": (1, "skip"), "ranges": ((0, 0.2), (0.1, 1))}, "level 'skip' has [0.1, 1)"),
        ({"selection": "topk", "levels": (1, "skip"), "ranges": ((0, 0.2), (0.2, 0.9))}, "the last one ends at 0.9"),
        ({"selection": "topk", "levels": ("skip",), "ranges": ((0, 1),)}, "skip cannot be the only level"),
        ({"error_weight": 0.1, "similarity_caps": ((2, 0.7),)}, "similarity_caps: ((2, 0.7),) have no meaning with"),
        ({**RANKED, "similarity_caps": 0.7},
         "similarity_caps: 0.7 is not one (level, least similarity) for each of the pooled levels (2, 8)"),
        ({**RANKED, "similarity_caps": ((2, 0.7),)}, "similarity_caps: ((2, 0.7),) is not one (level,"),
        ({**RANKED, "similarity_caps": ((2, 0.7), (4, 0.7))}, "for each of the pooled levels (2, 8)"),
        ({**RANKED, "similarity_caps": ((2, 0.7), (8, 1.2))}, "1.2 of level 8 is not a cosine from -1 to 1"),
        ({**RANKED, "levels": (2, 8, "skip"), "similarity_caps": ((2, 0.7), (8, 0.6)),
          "ranges": ((0, 0.2), (0.2, 0.6), (0.6, 1))}, "similarity_caps need level 1 and do not know 'block'"),
        ({**RANKED, "levels": (1, 2, 8, "block"), "similarity_caps": ((2, 0.7), (8, 0.6))},
         "similarity_caps need level 1 and do not know 'block'"),
    ],
)  # fmt: skip
def test_config_refuses(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        PSAConfig(**settings)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"grid": (2, 0, 3)}, "grid: (2, 0, 3) is not three whole numbers"),
        ({"grid": (2, 3)}, "grid: (2, 3) is not three whole numbers"),
        ({"grid": (2, 3, 4), "video_start": -2}, "video_start: -2 is not a whole number from 0 up"),
        ({"grid": (2, 3, 4), "video_start": 5, "tokens": 28}, "tokens: 28 is less than 29, where the video ends"),
        ({"grid": (2, 3, 4), "exact_spans": ((20, 30),)}, "exact_spans: (20, 30) is not a (start, stop)"),
        (
            {"grid": (2, 3, 4), "video_start": 5, "more_videos": ((28, (1, 2, 2)),)},
            "more_videos: (28, (1, 2, 2)) is not a (start, grid) with start from 29 up",
        ),
        ({"grid": (2, 3, 4), "more_videos": ((24, (1, 2)),)}, "more_videos: (24, (1, 2)) is not a (start, grid)"),
        (
            {"grid": (2, 3, 4), "more_videos": ((30, (1, 2, 2)), (33, (1, 1, 1)))},
            "more_videos: (33, (1, 1, 1)) is not a (start, grid) with start from 34 up",
        ),
        (
            {"grid": (2, 3, 4), "tokens": 33, "more_videos": ((30, (1, 2, 2)),)},
            "tokens: 33 is less than 34, where the last video ends",
        ),
    ],
)
def test_layout_refuses(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        TokenLayout(**arguments)


def test_a_missing_triton_is_named_with_its_package(monkeypatch: pytest.MonkeyPatch) -> None:
    from psa_pack.psa_core import capability

    monkeypatch.setattr(capability, "find_spec", lambda name: None)
    for platform, package in (("linux", "triton"), ("win32", "triton-windows")):
        monkeypatch.setattr(capability.sys, "platform", platform)
        reason = reason_against("triton", torch.device("cpu"), torch.float16, 64)
        assert f"install the {package} release that fits torch {torch.__version__}" in str(reason)
    with pytest.raises(BackendUnavailable, match="Triton is not installed"):
        attend(backend="triton")


def test_a_gpu_before_ampere_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    monkeypatch.setattr(torch.version, "hip", None)
    reason = reason_against("triton", torch.device("cuda"), torch.float16, 64)
    assert str(reason) == "the GPU is sm_75; the Triton kernels need sm_80 (Ampere) or newer"


def test_an_explicit_request_never_falls_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(BackendUnavailable, match="Triton kernels run on CUDA devices, not on cpu"):
        attend(backend="triton")


@pytest.mark.parametrize(
    ("hip", "version", "reason"),
    [
        (None, (7, 5), "the GPU is sm_75; the Triton kernels need sm_80 (Ampere) or newer"),
        ("6.2", (9, 0), "the Triton kernels are written for NVIDIA GPUs; AMD ones are not supported yet"),
        (None, (8, 0), None),
    ],
)
def test_which_gpus_the_kernels_are_for(
    hip: str | None, version: tuple[int, int], reason: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    from psa_pack.psa_core import capability

    monkeypatch.setattr(capability, "find_spec", lambda name: object())
    monkeypatch.setattr(torch.version, "hip", hip)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: version)
    found = capability.reason_against("triton", torch.device("cuda"), torch.bfloat16, 64)
    assert found is None if reason is None else str(found) == reason
    said = capability.reason_against("triton", torch.device("cuda"), torch.float64, 64)
    assert str(said) == "Triton kernels take bf16, fp16 and fp32, not torch.float64"


def test_a_reason_is_data_and_a_sentence() -> None:
    with pytest.raises(BackendUnavailable) as raised:
        attend(backend="triton", **{name: torch.randn(1, 2, 24, 64).double() for name in "qkv"})
    if raised.value.code != "triton_missing":
        assert (raised.value.code, raised.value.values) == ("dtype", {"dtype": "torch.float64"})
        assert str(raised.value) == "Triton kernels take bf16, fp16 and fp32, not torch.float64"
    for head_dim in HEAD_DIMS:
        assert reason_against("reference", torch.device("cpu"), torch.float64, head_dim, gradients=True) is None
    assert (
        str(reason_against("reference", torch.device("cpu"), torch.float16, 96)) == "head dim 96 is not one of 64, 128"
    )


@pytest.mark.parametrize("name", ["q", "k", "v"])
def test_gradients_are_refused_where_there_are_none(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from psa_pack.psa_core import capability

    monkeypatch.setattr(capability, "find_spec", lambda name: object())
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    inputs = {other: torch.randn(1, 2, LAYOUT.tokens, 64) for other in "qkv"}
    inputs[name].requires_grad_()
    with pytest.raises(BackendUnavailable, match="compute no gradients, and the inputs require them") as raised:
        attend(backend="triton", **inputs)
    assert raised.value.code == "gradients"
    assert attend(backend="auto", **inputs).requires_grad
    with torch.no_grad():
        assert not attend(backend="auto", **inputs).requires_grad


def test_with_gradients_auto_takes_the_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    from psa_pack.psa_core import backends

    monkeypatch.setattr(backends, "reason_against", lambda *args: None)
    monkeypatch.setattr(backends, "import_module", lambda name, package: name)
    plain = SimpleNamespace(device=torch.device("cuda"), dtype=torch.float16, shape=(1, 1, 1, 64), requires_grad=False)
    learning = SimpleNamespace(**vars(plain) | {"requires_grad": True})
    assert backends.resolve("auto", plain) == backends.resolve("auto", plain, plain, plain) == ".triton"
    assert backends.resolve("auto", plain, plain, learning) == ".reference"
    with torch.no_grad():
        assert backends.resolve("auto", plain, learning, plain) == ".triton"
