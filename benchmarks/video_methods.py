"""Ways to answer a video model's self-attention, each told as a row of data.

A row is a mapping such as ``{"error_weight": [0.001, 0.003], "ramp": 1}``. Its keys:

- ``method``: ``psa`` (when not given), ``flash`` (another dense kernel), ``sol_attn`` or ``sage``;
- ``preset``: ``FILE/NAME``, a preset of this project to begin with, such as ``wan2.1_1.3b/balanced``; ``FILE/*`` stands
  for all of a file, a row each. Without it: PSA's defaults, from the first step on;
- any field of PSAConfig or of Schedule, with ``block_weights`` as in a preset file (``{"0, 3-5": factor}``);
- ``tau`` of ``sol_attn``;
- ``name``: what the records call the row's family, where the settings themselves are not telling enough.

A list in ``error_weight``, ``tau``, ``ramp`` or ``start_percent`` stands for a row each. Rows that differ in
``error_weight`` or ``tau`` alone are one family, the points of one curve.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from benchmarks.peers import Unavailable, find
from psa_core import PSAConfig, TokenLayout, TokenOrder, plan_order, psa_attention
from psa_core.presets import load_presets
from psa_core.schedule import BlockList, BlockWeights, Schedule

ROOT = Path(__file__).resolve().parents[1]
METHODS = ("psa", "flash", "sol_attn", "sage")
SWEPT = ("error_weight", "tau", "ramp", "start_percent")
KNOBS = ("error_weight", "tau")  # what a family's rows differ in
COMING = ("mass_keys",)  # settings that a version of PSAConfig may not have
PERCENT_TOLERANCE = 1e-6

# The dense kernel that all videos are compared with, and another one beside it.
DENSE_KERNELS = {
    "cuda": (SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION),
    "cpu": (SDPBackend.FLASH_ATTENTION, SDPBackend.MATH),
}

RowData = Mapping[str, Any]


@dataclass(frozen=True)
class Row:
    """One way to attend.

    Args:
        method: One of ``METHODS``.
        family: Name of its curve.
        settings: What the row asks for, as data.
        config: Settings of a sparse call of PSA; of the others none.
        schedule: Where in a sampling attention is sparse, and how the error weight varies there.
        tau: Threshold of ``sol_attn``.
    """

    method: str
    family: str
    settings: RowData
    config: PSAConfig | None = None
    schedule: Schedule = field(default_factory=Schedule)
    tau: float | None = None

    @property
    def name(self) -> str:
        """Its name in the records, its own among all rows."""
        knobs = [f"{knob} {self.settings[knob]:g}" for knob in KNOBS if knob in self.settings]
        return ", ".join([self.family, *knobs])

    def settings_for(self, percent: float, block: int, layout: TokenLayout, blocks: int) -> PSAConfig | None:
        """PSA's settings of one call; None where it is dense, and for methods other than PSA."""
        if self.config is None or self.is_dense(percent, block, layout, blocks):
            return None
        if self.config.error_weight is None:
            return self.config
        factor = self.schedule.weight_at(percent, block, (("double", blocks),))
        return replace(self.config, error_weight=self.config.error_weight * factor)

    def is_dense(self, percent: float, block: int, layout: TokenLayout, blocks: int) -> bool:
        """Whether the schedule keeps a call dense."""
        schedule = self.schedule
        return (
            percent < schedule.start_percent - PERCENT_TOLERANCE
            or percent >= schedule.end_percent - PERCENT_TOLERANCE
            or block in schedule.dense_blocks.resolve(blocks)
            or layout.tokens < schedule.min_tokens
        )


def read_rows(data: list[RowData]) -> Iterator[Row | tuple[str, str]]:
    """The rows that data stand for, in their order; name and reason of each that cannot be had here.

    Raises:
        ValueError: a row has a key or value that there is not.
    """
    for given in itertools.chain.from_iterable(map(_expand, data)):
        try:
            yield read_row(given)
        except Unavailable as error:
            yield _family(given), str(error)


def read_row(given: RowData) -> Row:
    """The row that one mapping stands for.

    Raises:
        ValueError: a key or value that there is not.
        Unavailable: the method is not installed, or PSAConfig lacks a setting.
    """
    method = given.get("method", "psa")
    if method not in METHODS:
        raise ValueError(f"row: method {method!r} is not one of {', '.join(METHODS)}")
    if method == "sol_attn":
        find("comfy_kitchen")
    if method == "sage":
        find("sageattention")
    settings = {key: value for key, value in given.items() if key not in ("name", "preset", "method", "tau")}
    config, schedule = PSAConfig(error_weight=0.0), Schedule()
    if "preset" in given:
        file, _, name = given["preset"].partition("/")
        presets = load_presets(ROOT / "presets" / f"{file}.yaml")
        if name not in presets:
            raise ValueError(f"row: preset {name!r} is not one of {file}'s: {', '.join(presets)}")
        preset = presets[name]
        # The models here are smaller than those that presets are for.
        config, schedule = preset.config, replace(preset.schedule, min_tokens=0)
    config = _with(config, settings)
    schedule = _with(schedule, settings)
    if settings:
        raise ValueError(f"row: unknown {', '.join(settings)} in {dict(given)!r}")
    return Row(
        method=method,
        family=_family(given),
        settings=dict(given),
        config=config if method == "psa" else None,
        schedule=schedule,
        tau=given.get("tau"),
    )


def _expand(given: RowData) -> Iterator[RowData]:
    """A row for every value of its lists, and for every preset of a file."""
    presets = [given.get("preset")]
    if str(presets[0]).endswith("/*"):
        file = given["preset"][:-2]
        presets = [f"{file}/{name}" for name in load_presets(ROOT / "presets" / f"{file}.yaml")]
    swept = [key for key in SWEPT if isinstance(given.get(key), list)]
    for preset, *values in itertools.product(presets, *(given[key] for key in swept)):
        chosen = {"preset": preset} if preset else {}
        yield {**given, **chosen, **dict(zip(swept, values, strict=True))}


def _family(given: RowData) -> str:
    """A name for all rows that differ from this one in a knob alone."""
    if "name" in given:
        return str(given["name"])
    parts = [given["method"]] if "method" in given else []
    parts += [given["preset"].partition("/")[2]] if "preset" in given else []
    for key, value in given.items():
        if key not in (*KNOBS, "method", "preset"):
            shown = " ".join(f"{k}: {v}" for k, v in value.items()) if isinstance(value, dict) else value
            parts.append(f"{key} {shown}")
    return ", ".join(parts) or "flat"


def _with(settings: Any, given: dict[str, Any]) -> Any:
    """Settings with those of their fields that are given, which are taken out of what is given."""
    names = {part.name for part in fields(settings)}
    if isinstance(settings, PSAConfig):
        for name in COMING:
            if name in given and name not in names:
                raise Unavailable(f"this PSAConfig has no {name}")
    mine: dict[str, Any] = {}
    for name in [name for name in given if name in names]:
        value = given.pop(name)
        mine[name] = tuple(value) if isinstance(value, list) else value
    if "dense_blocks" in mine:
        mine["dense_blocks"] = BlockList.parse(mine["dense_blocks"])
    if "block_weights" in mine:
        mine["block_weights"] = BlockWeights.parse(mine["block_weights"])
    return replace(settings, **mine)


class DenseAttention:
    """Dense attention by one of PyTorch's kernels."""

    percent = 0.0

    def __init__(self, device: torch.device, other: bool = False) -> None:
        self._kernel = DENSE_KERNELS[device.type][other]

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, block: int) -> Tensor:
        """See :class:`benchmarks.small_models.VideoAttention`."""
        with sdpa_kernel(self._kernel):
            return scaled_dot_product_attention(q, k, v)

    def work_by_step(self) -> list[float] | None:
        """Mean share of the dense work over the calls of each step; none where all of it is done."""
        return None

    def work(self) -> float | None:
        """Mean share of the dense work over all calls."""
        return 1.0


class RowAttention:
    """One video's self-attention as a row says; counts its work.

    Args:
        row: How to attend.
        layout: The video's tokens.
        blocks: Transformer blocks of the model.
        device: Where the calls are.
    """

    def __init__(self, row: Row, layout: TokenLayout, blocks: int, device: torch.device) -> None:
        self.percent = 0.0
        self._row, self._layout, self._blocks = row, layout, blocks
        self._dense = DenseAttention(device, other=row.method == "flash")
        self._order: TokenOrder | None = plan_order(layout, row.config, device) if row.config else None
        self._peer = _peer(row)
        self._shares: dict[float, list[Tensor]] = {}  # of the dense work, of every call, by the sampling that is done
        self._whole = torch.ones((), device=device)

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, block: int) -> Tensor:
        """See :class:`benchmarks.small_models.VideoAttention`."""
        shares = self._shares.setdefault(self.percent, [])
        if self._row.is_dense(self.percent, block, self._layout, self._blocks):
            shares.append(self._whole)
            return self._dense(q, k, v, block)
        if self._peer is not None:
            return self._peer(q, k, v)
        config = self._row.settings_for(self.percent, block, self._layout, self._blocks)
        if config is None:  # the other dense kernel
            shares.append(self._whole)
            return self._dense(q, k, v, block)
        # As the node does, which counts every call.
        out = psa_attention(q, k, v, layout=self._layout, config=config, order=self._order, stats=True)
        assert isinstance(out, tuple)
        shares.append(out[1].density.mean())
        return out[0]

    def work_by_step(self) -> list[float] | None:
        """Mean share of the dense work over the calls of each step; none where the method does not tell."""
        if self._peer is not None:
            return None
        return [float(torch.stack(shares).double().mean()) for shares in self._shares.values()]

    def work(self) -> float | None:
        """Mean share of the dense work over all calls; None where the method does not tell."""
        if self._row.method == "sage":
            return 1.0
        by_step = self.work_by_step()
        return None if by_step is None else sum(by_step) / len(by_step)


def _peer(row: Row) -> Callable[[Tensor, Tensor, Tensor], Tensor] | None:
    """Attention by somebody else's kernel, called as in :mod:`benchmarks.peers`."""
    if row.method == "sol_attn":
        kitchen = find("comfy_kitchen")

        def sol(*tensors: Tensor) -> Tensor:
            out: Tensor = kitchen.sol_attn(*(x.transpose(1, 2) for x in tensors), tau=row.tau)
            return out.transpose(1, 2)

        return sol
    if row.method == "sage":
        module = find("sageattention")

        def sage(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            # Version 1 centres the caller's keys in place; nobody needs them afterwards here.
            out: Tensor = module.sageattn(*(x.transpose(1, 2) for x in (q, k, v)), tensor_layout="NHD", is_causal=False)
            return out.transpose(1, 2)

        return sage
    return None
