"""The self-check of every kind of config: right where the backend is, and failing where it is not."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from psa_pack.psa_core import PSAConfig
from psa_pack.psa_core.backends import reference
from psa_pack.psa_core.presets import load_presets
from psa_pack.psa_core.self_check import SelfCheckFailed, check_once, representative, self_check
from torch import Tensor

from conftest import ROOT
from oracle import CAPPED, MIXED, THRESHOLD, TOPK

pytestmark = pytest.mark.usefixtures("one_thread")

CPU = torch.device("cpu")


def ranked(selection: str, *levels: Any, **others: Any) -> PSAConfig:
    """Levels by rank, in equal shares."""
    count = len(levels)
    ranges = tuple((index / count, (index + 1) / count) for index in range(count))
    return PSAConfig(selection=selection, levels=levels, ranges=ranges, **others)  # type: ignore[arg-type]


KINDS = {
    "error": MIXED,
    "error, small blocks": dataclasses.replace(MIXED, query_block=64, key_block=32, importance_stride=1),
    "error, large blocks, few levels": PSAConfig(error_weight=1.0, levels=(1, 8), key_block=128, importance_stride=2),
    "dense": PSAConfig(error_weight=0.0, levels=(1,)),
    "topk": TOPK,
    "topk, small blocks": dataclasses.replace(TOPK, query_block=64, key_block=32),
    "topk, large blocks": dataclasses.replace(TOPK, key_block=128),
    "topk, all levels and skip": ranked("topk", 1, 2, 4, 8, "block", "skip", key_block=128, variance_term=False),
    "topk, nothing exact": ranked("topk", 2, "block"),
    "threshold": THRESHOLD,
    "threshold, small blocks": dataclasses.replace(THRESHOLD, key_block=32),
    "threshold, all levels and skip": ranked("threshold", 1, 2, 4, 8, "block", "skip", key_block=128),
    "capped": CAPPED,
    "capped, large blocks": dataclasses.replace(CAPPED, key_block=128),
    "capped, small blocks, few levels": ranked("topk", 1, 8, "skip", key_block=32, similarity_caps=((8, 0.5),)),
}


def bundled() -> dict[str, PSAConfig]:
    """What the bundled presets are checked by, once each."""
    kinds: dict[PSAConfig, str] = {}
    for path in sorted(Path(ROOT, "presets").glob("*.yaml")):
        for name, preset in load_presets(path).items():
            kinds.setdefault(representative(preset.config), f"{path.stem} {name}")
    return {name: config for config, name in kinds.items()}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("config", (every := KINDS | bundled()).values(), ids=every)
def test_what_is_right_passes(config: PSAConfig, dtype: torch.dtype) -> None:
    check_once.__wrapped__(CPU, dtype, 64, "reference", representative(config))


def test_what_specialises_no_kernel_needs_no_other_check(monkeypatch: pytest.MonkeyPatch) -> None:
    changes: dict[str, Any] = {"error_weight": 0.1, "order": "raster", "workspace_mib": 64}
    assert representative(MIXED) == representative(dataclasses.replace(MIXED, **changes))
    others = {"ranges": ((0, 0.1), (0.1, 0.2), (0.2, 0.4), (0.4, 0.5), (0.5, 1)), "order": "tile", "tile": (2, 2, 4)}
    caps = ((2, 0.7), (4, 0.6), (8, 0.5))
    assert representative(CAPPED) == representative(dataclasses.replace(CAPPED, similarity_caps=caps, **others))
    seen = []
    monkeypatch.setattr("psa_pack.psa_core.self_check.check_once", lambda *key: seen.append(key))
    self_check(CPU, torch.float32, 64, "reference", MIXED)
    assert seen == [(CPU, torch.float32, 64, "reference", representative(MIXED))]


@pytest.mark.parametrize(
    "change",
    [
        {"query_block": 64}, {"key_block": 32}, {"importance_stride": 1}, {"variance_term": False},
        {"similarity_caps": None}, {"selection": "topk"},
        {"levels": (1, 2, 4, 8, "block"), "similarity_caps": None},
    ],
    ids=str,
)  # fmt: skip
def test_what_specialises_kernels_is_checked_on_its_own(change: dict[str, Any]) -> None:
    assert representative(CAPPED) != representative(dataclasses.replace(CAPPED, **change))


def shift_level(code: int) -> Callable[[pytest.MonkeyPatch], None]:
    """Rows of one level are read from the next group."""

    def spoil(monkeypatch: pytest.MonkeyPatch) -> None:
        prepare = reference.prepare

        def prepare_wrongly(*args: Any) -> reference.Prepared:
            prepared = prepare(*args)
            pyramid = tuple(
                dataclasses.replace(level, values=level.values.flatten(2, 3).roll(1, 2).view_as(level.values))
                if level.group_size == 1 << code
                else level
                for level in prepared.pyramid
            )
            return dataclasses.replace(prepared, pyramid=pyramid)

        monkeypatch.setattr(reference, "prepare", prepare_wrongly)

    return spoil


def change_codes(change: Callable[[Tensor], Tensor]) -> Callable[[pytest.MonkeyPatch], None]:
    """Something goes wrong after the selection."""

    def spoil(monkeypatch: pytest.MonkeyPatch) -> None:
        select = reference.select
        monkeypatch.setattr(reference, "select", lambda *args: change(select(*args)))

    return spoil


def rank_the_other_way_round(monkeypatch: pytest.MonkeyPatch) -> None:
    importance = reference.importance
    monkeypatch.setattr(reference, "importance", lambda prepared: 1 / importance(prepared))


def forget_the_caps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reference, "cap_levels", lambda codes, limits: codes)


def forget_log_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = reference._selected_rows

    def without_bias(*args: Any) -> Any:
        return ((keys, values, 0 * bias) for keys, values, bias in rows(*args))

    monkeypatch.setattr(reference, "_selected_rows", without_bias)


FAULTS: dict[str, tuple[PSAConfig, Callable[[pytest.MonkeyPatch], None]]] = {
    "level 2 of topk": (TOPK, shift_level(1)),
    "level 4 of topk": (TOPK, shift_level(2)),
    "level 8 of topk": (TOPK, shift_level(3)),
    "level 8 of threshold, large blocks": (KINDS["threshold, all levels and skip"], shift_level(3)),
    "whole blocks": (KINDS["topk, all levels and skip"], shift_level(7)),
    "level 8 of error, large blocks": (KINDS["error, large blocks, few levels"], shift_level(3)),
    "one block more is skipped": (TOPK, change_codes(lambda codes: codes.where(codes != 3, 255))),
    "a level too far": (TOPK, change_codes(lambda codes: codes.where(codes != 2, 3))),
    "all is exact": (TOPK, change_codes(lambda codes: 0 * codes)),
    "another block's level": (THRESHOLD, change_codes(lambda codes: codes.roll(1, -1))),
    "ranked the other way round": (TOPK, rank_the_other_way_round),
    "caps forgotten": (CAPPED, forget_the_caps),
    "caps forgotten, large blocks": (KINDS["capped, large blocks"], forget_the_caps),
    "no logarithm of counts": (TOPK, forget_log_counts),
}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize(("config", "spoil"), FAULTS.values(), ids=FAULTS)
def test_what_is_wrong_fails(
    config: PSAConfig,
    spoil: Callable[[pytest.MonkeyPatch], None],
    dtype: torch.dtype,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    spoil(monkeypatch)
    with pytest.raises(SelfCheckFailed, match="self-check of backend reference on cpu"):
        check_once.__wrapped__(CPU, dtype, 64, "reference", representative(config))
