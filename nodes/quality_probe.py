"""PSA Quality Probe: samples as KSampler does, measures the error of the patch, and suggests settings."""

from __future__ import annotations

import itertools
from collections.abc import Collection, Sequence
from typing import Any

import comfy.samplers
import numpy as np
from comfy.model_patcher import ModelPatcher
from comfy_api.latest import io

from nodes import common_ksampler

from ..psa_core.presets import Preset, change
from .attention_patch import PROBE_KEY, AttentionPatch
from .preset_loader import PresetSocket
from .probe import Probe, ProbedCall
from .run_record import RunRecord
from .session import PatchSettings
from .status import running_server, status_line, user_language
from .suggestion import Curve, Suggestion, by_block, plain, suggest
from .translations import translated

PRESET_SUFFIX = "-probed"

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
                        "its size. 0.04 is about that of balanced, 0.03 of quality, 0.06 of fast."
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
        report = translated(report, user_language(running_server()))
        status_line(cls.hidden.unique_id if cls.hidden else None)(beginning(report))
        return io.NodeOutput(latent, report, suggested_preset(patch.settings, suggestion, wanted_error))


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
) -> str:
    """The report: what to set, what was measured, and what measuring cost."""
    paragraphs = [f"PSA Quality Probe: {settings.title}"]
    if suggestion is None:
        paragraphs.append(_nothing_measured(probe, record))
    else:
        paragraphs.append(_values(settings, suggestion))
        paragraphs.append(_expectation(probe, settings, suggestion, wanted))
        if suggestion.error_weight is not None:
            paragraphs.append(_table_of_weights(probe))
        paragraphs.append(_table_of_blocks(probe))
    paragraphs.append(_cost(probe, record))
    return "\n\n".join(filter(None, paragraphs))


def beginning(report: str) -> str:
    """What has room on the node: the report without its title, up to the first table."""
    _, *paragraphs = report.split("\n\n")
    return "\n".join(itertools.takewhile(lambda paragraph: " | " not in paragraph, paragraphs))


def _nothing_measured(probe: Probe, record: RunRecord | None) -> str:
    if record is None:
        return "Nothing was sampled, so nothing was measured. The preset is unchanged."
    if not record.sparse_calls:
        return f"No attention call was sparse, so nothing was measured and the preset is unchanged. The run: {record}"
    if probe.dropped or probe.not_finite:
        return "No comparison gave a number. The preset is unchanged."
    return f"None of the {record.sparse_calls} sparse calls was in the share; raise it. The preset is unchanged."


def _values(settings: PatchSettings, suggestion: Suggestion) -> str:
    lines = []
    if suggestion.error_weight is None:
        lines.append(
            f"No error_weight is suggested: this preset selects by {settings.preset.config.selection}, not by error."
        )
    else:
        lines.append(f"error_weight: {plain(suggestion.error_weight)}")
    if suggestion.dense_blocks:
        lines.append(f"dense_blocks: {dense_blocks_text(settings, suggestion)}")
    else:
        lines.append("dense_blocks: leave as it is, no block stands out")
    return "\n\n".join(lines)  # as Markdown, which Preview as Text shows, they would share a line otherwise


def _expectation(probe: Probe, settings: PatchSettings, suggestion: Suggestion, wanted: float) -> str:
    curve = _curve(probe)
    lines = []
    if suggestion.error_weight is not None:
        rest = " in the blocks that stay sparse" if suggestion.dense_blocks else ""
        lines.append(
            f"With that, expect an error of {suggestion.error:.4f} at density {suggestion.density:.3f}{rest}; "
            f"wanted was {wanted:g}."
        )
    if suggestion.out_of_reach:
        end = "smallest" if suggestion.out_of_reach == "below" else "largest"
        lines.append(
            f"The wanted error is {suggestion.out_of_reach} all that were measured, so this is the {end} weight tried. "
            "Set it in the patch and probe again."
        )
    if probe.running is not None:
        error, density = float(curve.errors[probe.running]), float(curve.densities[probe.running])
        weight = settings.preset.config.error_weight
        having = "" if weight is None else f" with error_weight {plain(weight)}"
        lines.append(f"This run{having} had an error of {error:.4f} at density {density:.3f}.")
    else:
        lines.append("This run was exact, with error_weight 0.")
    return "\n".join(lines)


def _table_of_weights(probe: Probe) -> str:
    curve = _curve(probe)
    rows = [("error_weight", "error", "density")]
    for weight, error, density in zip(curve.weights, curve.errors, curve.densities, strict=True):
        rows.append((plain(weight or 0.0), f"{error:.4f}", f"{density:.3f}"))
    return _table(rows)


def _table_of_blocks(probe: Probe) -> str:
    """Mean errors by groups of blocks and of steps, and the blocks with the largest ones.

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
    title = "Errors" if weight is None else f"Errors at error_weight {plain(weight)}"
    listed = ", ".join(f"block {block} {means[block]:.4f}" for block in largest)
    return f"{title}; the largest: {listed}\n\n{_table(rows)}"


def _cost(probe: Probe, record: RunRecord | None) -> str:
    lines = []
    if probe.calls and record is not None:
        lines.append(
            f"{len(probe.calls)} of {record.sparse_calls} sparse calls were compared. Probing took "
            f"{probe.seconds:.1f} s of {probe.elapsed:.1f} s of sampling: the run was {probe.slowdown:.2f} times as "
            "long as without."
        )
        sparse = {call.block for call in record.calls if call.density is not None}
        if unseen := sparse - {call.block for call in probe.calls}:
            lines.append(f"No call of blocks {_ranges_text(unseen)} is among them; a larger share would reach them.")
    for reason, count in probe.dropped.items():
        lines.append(f"{count} comparisons were given up {reason}.")
    if probe.not_finite:
        lines.append(
            f"{probe.not_finite} comparisons gave no finite error and are left out; in {probe.dense_not_finite} of "
            "them dense attention itself was not finite."
        )
    return "\n".join(lines)


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
