"""PSA Quality Probe: samples as KSampler does, measures the error of the patch, and suggests settings."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any, TypeAlias

import comfy.samplers
import numpy as np
from comfy.model_patcher import ModelPatcher
from comfy_api.latest import io

from nodes import common_ksampler

from ..psa_core.presets import Preset, change
from .attention_patch import PROBE_KEY, AttentionPatch
from .gate import PatchSettings
from .preset_loader import PresetSocket
from .probe import Probe, ProbedCall
from .run_record import RunRecord
from .status import running_server, status_line, user_language
from .suggestion import Curve, Suggestion, by_block, suggest
from .words import Words, plain, say_lines

PRESET_SUFFIX = "-probed"

Paragraph: TypeAlias = "tuple[Words, ...] | str"
"""Sentences, a line each; or a table, which is the same in every language."""

_MOST_STEPS = 10000
_TABLE_ROWS, _TABLE_COLUMNS = 10, 4


class PSAQualityProbe(io.ComfyNode):
    """Samples, and measures the error of sparse attention on the way."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="PSAQualityProbe",
            display_name="PSA Quality Probe",
            category="sampling",
            description=(
                "Takes KSampler's place for one run and measures how far PSA's attention is from dense attention, in "
                "which blocks and steps. From that it suggests error_weight and dense_blocks for the error that you "
                "want, as text and as a preset. The latent is the one that KSampler would give; the run takes longer."
            ),
            inputs=[
                io.Model.Input("model", tooltip="The model with PSA Attention Patch. The node works on a copy of it."),
                io.Int.Input(
                    "seed",
                    default=0,
                    min=0,
                    max=0xFFFFFFFFFFFFFFFF,
                    control_after_generate=True,
                    tooltip="Seed of the noise.",
                ),
                io.Int.Input("steps", default=20, min=1, max=_MOST_STEPS, tooltip="Steps of the whole sampling."),
                io.Float.Input(
                    "cfg", default=8.0, min=0.0, max=100.0, step=0.1, round=0.01, tooltip="Strength of the guidance."
                ),
                io.Combo.Input("sampler_name", options=comfy.samplers.KSampler.SAMPLERS, tooltip="The sampler."),
                io.Combo.Input("scheduler", options=comfy.samplers.KSampler.SCHEDULERS, tooltip="The noise schedule."),
                io.Conditioning.Input("positive", tooltip="What the video should show."),
                io.Conditioning.Input("negative", tooltip="What it should not show."),
                io.Latent.Input("latent_image", tooltip="The latent to denoise."),
                io.Float.Input(
                    "denoise",
                    default=1.0,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    tooltip="How much of the noise schedule is used; less than 1 keeps something of the latent.",
                ),
                io.Float.Input(
                    "share",
                    default=0.1,
                    min=0.01,
                    max=1.0,
                    step=0.01,
                    tooltip=(
                        "Share of the sparse attention calls that are also computed dense and at other values of "
                        "error_weight. The calls are spread over all blocks and steps. More is surer and slower."
                    ),
                ),
                io.Float.Input(
                    "wanted_error",
                    default=0.04,
                    min=0.001,
                    max=1.0,
                    step=0.005,
                    round=0.001,
                    tooltip=(
                        "The mean error of attention that you want: the distance from dense attention's output over "
                        "its size. 0.045 is about that of balanced where its weight is full, 0.03 of quality, 0.07 of "
                        "fast."
                    ),
                ),
                *_advanced_inputs(),
            ],
            outputs=[
                io.Latent.Output(tooltip="The denoised latent, the same as KSampler's."),
                io.String.Output(
                    "report",
                    display_name="report",
                    tooltip="What was measured, and the two values to paste. Preview as Text shows it.",
                ),
                PresetSocket.Output(
                    "psa_preset",
                    display_name="preset",
                    tooltip=(
                        "The patch's preset with the suggested values, for custom_preset of PSA Attention Patch, or "
                        "for base of PSA Preset, which saves it."
                    ),
                ),
            ],
            hidden=[io.Hidden.unique_id],
            is_output_node=True,
        )

    @classmethod
    def execute(
        cls,
        model: ModelPatcher,
        seed: int,
        steps: int,
        cfg: float,
        sampler_name: str,
        scheduler: str,
        positive: Any,
        negative: Any,
        latent_image: dict[str, Any],
        denoise: float,
        share: float,
        wanted_error: float,
        add_noise: bool = True,
        start_at_step: int = 0,
        end_at_step: int = _MOST_STEPS,
        return_with_leftover_noise: bool = False,
    ) -> io.NodeOutput:
        patch = AttentionPatch.find(model)
        if patch is None:
            raise ValueError(
                "model: it is not patched; connect a model that comes from PSA Attention Patch, its preset not set to "
                "off"
            )
        _check_range("share", share, 0.01, 1.0)
        _check_range("wanted_error", wanted_error, 0.001, 1.0)
        probe = Probe(patch.settings.preset.config, share)
        probed = model.clone()
        probed.model_options.setdefault("transformer_options", {})[PROBE_KEY] = probe
        before = patch.last_run
        (latent,) = common_ksampler(
            probed,
            seed,
            steps,
            cfg,
            sampler_name,
            scheduler,
            positive,
            negative,
            latent_image,
            denoise=denoise,
            disable_noise=not add_noise,
            start_step=start_at_step,
            last_step=end_at_step,
            force_full_denoise=not return_with_leftover_noise,
        )
        record = None if patch.last_run is before else patch.last_run
        weights = tuple(config.error_weight for config in probe.configs)
        suggestion = suggest(probe.calls, weights, wanted_error) if probe.calls else None
        report = describe(probe, patch.settings, record, suggestion, wanted_error)
        status_line(cls.hidden.unique_id if cls.hidden else None)(beginning(report))
        text = in_words(report, user_language(running_server()))
        return io.NodeOutput(latent, text, suggested_preset(patch.settings, suggestion, wanted_error))


def _advanced_inputs() -> list[io.WidgetInput]:
    widgets = [
        io.Boolean.Input(
            "add_noise", default=True, optional=True, tooltip="Off for a sampler that goes on from another one's noise."
        ),
        io.Int.Input(
            "start_at_step",
            default=0,
            min=0,
            max=_MOST_STEPS,
            optional=True,
            tooltip="First of the steps that this sampler takes, as in KSampler (Advanced).",
        ),
        io.Int.Input(
            "end_at_step",
            default=_MOST_STEPS,
            min=0,
            max=_MOST_STEPS,
            optional=True,
            tooltip="Step before which it ends, as in KSampler (Advanced).",
        ),
        io.Boolean.Input(
            "return_with_leftover_noise",
            default=False,
            optional=True,
            tooltip="On for a sampler that another one follows.",
        ),
    ]
    for widget in widgets:
        # ComfyUI 0.3.x has no `advanced` argument, but passes this on all the same.
        widget.extra_dict["advanced"] = True
    return widgets


def _check_range(name: str, value: float, least: float, largest: float) -> None:
    if not least <= value <= largest:  # as NaN is not
        raise ValueError(f"{name}: {value!r} is not a number from {least:g} to {largest:g}")


def suggested_preset(settings: PatchSettings, suggestion: Suggestion | None, wanted: float) -> Preset:
    """The patch's preset with the suggested values; as it is where nothing is suggested."""
    base = settings.preset
    if suggestion is None or (suggestion.error_weight is None and not suggestion.dense_blocks):
        return base
    values = {} if suggestion.error_weight is None else {"error_weight": suggestion.error_weight}
    blocks = {"dense_blocks": dense_blocks_text(settings, suggestion)} if suggestion.dense_blocks else {}
    name = base.name.removesuffix(PRESET_SUFFIX)[: 64 - len(PRESET_SUFFIX)] + PRESET_SUFFIX
    source = f"changed from {base.family} {base.name}; PSA Quality Probe for a mean error of {wanted:g}"
    return change(base, values, blocks, name=name, source=source)


def dense_blocks_text(settings: PatchSettings, suggestion: Suggestion) -> str:
    """Every block that should be dense, as the patch's input takes it; the preset's own words where none is added."""
    if not suggestion.dense_blocks:
        return str(settings.preset.schedule.dense_blocks)
    return _ranges_text(settings.dense_blocks | set(suggestion.dense_blocks))


def describe(
    probe: Probe, settings: PatchSettings, record: RunRecord | None, suggestion: Suggestion | None, wanted: float
) -> list[Paragraph]:
    """The report: what to set, what was measured, and what measuring cost."""
    report: list[Paragraph] = [(Words.of("probe_title", title=settings.title),)]
    if suggestion is None:
        report.append((_nothing_measured(probe, record),))
    else:
        # As Markdown, which Preview as Text shows, values of one paragraph would share a line.
        report += [(value,) for value in _values(settings, suggestion)]
        report.append(_expectation(probe, settings, suggestion, wanted))
        if suggestion.error_weight is not None:
            report.append(_table_of_weights(probe))
        report += _table_of_blocks(probe)
    return [*report, *filter(None, [_cost(probe, record)])]


def in_words(report: Sequence[Paragraph], language: str) -> str:
    """The report as text."""
    return "\n\n".join(part if isinstance(part, str) else say_lines(part, language) for part in report)


def beginning(report: Sequence[Paragraph]) -> list[Words]:
    """What has room on the node: the report without its title, up to the first table."""
    lines: list[Words] = []
    for part in report[1:]:
        if isinstance(part, str):
            break
        lines += part
    return lines


def _nothing_measured(probe: Probe, record: RunRecord | None) -> Words:
    if record is None:
        return Words.of("nothing_sampled")
    if not record.sparse_calls:
        return Words.of("nothing_sparse", run=record.in_one_line())
    if probe.dropped or probe.not_finite:
        return Words.of("no_number")
    return Words.of("none_in_share", calls=record.sparse_calls)


def _values(settings: PatchSettings, suggestion: Suggestion) -> list[Words]:
    if suggestion.error_weight is None:
        weight = Words.of("no_weight", selection=settings.preset.config.selection)
    else:
        weight = Words.of("weight_value", weight=plain(suggestion.error_weight))
    if suggestion.dense_blocks:
        return [weight, Words.of("blocks_value", blocks=dense_blocks_text(settings, suggestion))]
    return [weight, Words.of("no_block_stands_out")]


def _expectation(probe: Probe, settings: PatchSettings, suggestion: Suggestion, wanted: float) -> tuple[Words, ...]:
    curve = _curve(probe)
    lines = []
    if suggestion.error_weight is not None:
        if settings.preset.schedule.varies:
            lines.append(Words.of("base_weight"))
        key = "expected_of_the_rest" if suggestion.dense_blocks else "expected"
        lines.append(Words.of(key, error=suggestion.error, density=suggestion.density, wanted=wanted))
    if suggestion.out_of_reach:
        lines.append(Words.of(f"{suggestion.out_of_reach}_reach"))
    if probe.running is None:
        lines.append(Words.of("this_run_exact"))
    else:
        measured = {
            "error": float(curve.errors[probe.running]),
            "density": float(curve.densities[probe.running]),
        }
        weight = settings.preset.config.error_weight
        if weight is None:
            lines.append(Words.of("this_run", **measured))
        else:
            lines.append(Words.of("this_run_at_weight", weight=plain(weight), **measured))
    return tuple(lines)


def _table_of_weights(probe: Probe) -> str:
    curve = _curve(probe)
    rows = [("error_weight", "error", "density")]
    for weight, error, density in zip(curve.weights, curve.errors, curve.densities, strict=True):
        rows.append((plain(weight or 0.0), f"{error:.4f}", f"{density:.3f}"))
    return _table(rows)


def _table_of_blocks(probe: Probe) -> list[Paragraph]:
    """The blocks with the largest errors, and mean errors by groups of blocks and of steps.

    They are those of the run; where that was exact, those of the weight in the middle.
    """
    place = len(probe.configs) // 2 if probe.running is None else probe.running
    steps = _groups(sorted({call.step for call in probe.calls}), _TABLE_COLUMNS)
    blocks = by_block(probe.calls)
    rows = [("blocks", *(_plural("step", group[0] + 1, group[-1] + 1) for group in steps), "all")]
    for group in _groups(list(blocks), _TABLE_ROWS):
        own = [call for block in group for call in blocks[block]]
        cells = [_mean_error([call for call in own if call.step in chosen], place) for chosen in steps]
        rows.append((_range_text(group[0], group[-1]), *cells, _mean_error(own, place)))
    means = {block: float(np.mean([call.errors[place] for call in calls])) for block, calls in blocks.items()}
    largest = sorted(means, key=lambda block: -means[block])[:3]
    weight = probe.configs[place].error_weight
    listed = tuple(Words.of("block_error", block=block, error=means[block]) for block in largest)
    title = Words.of("errors", largest=listed)
    if weight is not None:
        title = Words.of("errors_at_weight", weight=plain(weight), largest=listed)
    return [(title,), _table(rows)]


def _cost(probe: Probe, record: RunRecord | None) -> tuple[Words, ...]:
    lines = []
    if probe.calls and record is not None:
        lines.append(
            Words.of(
                "compared",
                compared=len(probe.calls),
                calls=record.sparse_calls,
                seconds=probe.seconds,
                elapsed=probe.elapsed,
                slowdown=probe.slowdown,
            )
        )
        sparse = {call.block for call in record.calls if call.density is not None}
        if unseen := sparse - {call.block for call in probe.calls}:
            lines.append(Words.of("unseen_blocks", blocks=_ranges_text(unseen)))
    lines += [Words.of("given_up", count=count, reason=reason) for reason, count in probe.dropped.items()]
    if probe.not_finite:
        lines.append(Words.of("not_finite", count=probe.not_finite, dense=probe.dense_not_finite))
    return tuple(lines)


def _curve(probe: Probe) -> Curve:
    return Curve.of(probe.calls, tuple(config.error_weight for config in probe.configs))


def _mean_error(calls: Sequence[ProbedCall], place: int) -> str:
    return f"{np.mean([call.errors[place] for call in calls]):.4f}" if calls else "-"


def _groups(items: Sequence[int], most: int) -> list[list[int]]:
    """Neighbours together, in at most so many groups of about the same size."""
    return [group.tolist() for group in np.array_split(items, min(most, len(items)))]


def _table(rows: Sequence[Sequence[str]]) -> str:
    """Columns set off by bars, which is a table in Markdown as well."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = [" | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
    lines.insert(1, "-|-".join("-" * width for width in widths))
    return "\n".join(lines)


def _plural(word: str, first: int, last: int) -> str:
    return f"{word if first == last else word + 's'} {_range_text(first, last)}"


def _ranges_text(blocks: Collection[int]) -> str:
    firsts = sorted(block for block in blocks if block - 1 not in blocks)
    lasts = sorted(block for block in blocks if block + 1 not in blocks)
    return ", ".join(map(_range_text, firsts, lasts))


def _range_text(first: int, last: int) -> str:
    return str(first) if first == last else f"{first}-{last}"
