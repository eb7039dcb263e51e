"""PSA Report: what the latest sampling run did, as a picture and as text."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from comfy.model_patcher import ModelPatcher
from comfy_api.latest import io, ui

from .attention_patch import AttentionPatch
from .report_picture import THEMES, draw_message, draw_run, most_first, seconds_text
from .run_facts import RunFacts
from .run_record import RunRecord
from .status import running_server, user_language
from .translations import translated

_UNPATCHED = ("PSA is not on this model", "It has no PSA Attention Patch, or the preset is off.")
_NO_RUN = ("No run yet", "Sample with this model, then run the report; connect the sampler's latent to it.")


class PSAReport(io.ComfyNode):
    """Shows what PSA did in the latest run of a model."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="PSAReport",
            display_name="PSA Report",
            category="model/patch",
            description=(
                "Shows what PSA did in the latest sampling run of a model: density of each step and block, levels, "
                "time in attention against dense, and why calls stayed dense. Put it right after the sampler."
            ),
            inputs=[
                io.Latent.Input(
                    "samples",
                    tooltip="The sampler's output. It is passed on as it is; it makes the report wait for the sampler.",
                ),
                io.Model.Input(
                    "model", tooltip="The patched model that the sampler used. Nodes between the two do not matter."
                ),
                io.Combo.Input("theme", options=list(THEMES), default="dark", tooltip="Colours of the picture."),
            ],
            outputs=[
                io.Latent.Output("samples_out", display_name="samples", tooltip="The sampler's output, unchanged."),
                io.Image.Output("picture", display_name="picture", tooltip="The report as a picture."),
                io.String.Output("text", display_name="text", tooltip="The report as text."),
            ],
            is_output_node=True,
        )

    @classmethod
    def execute(cls, samples: dict[str, Any], model: ModelPatcher, theme: str = "dark") -> io.NodeOutput:
        if theme not in THEMES:
            raise ValueError(f"theme: {theme!r} is not one of {', '.join(THEMES)}")
        patch = AttentionPatch.find(model)
        if patch is None or patch.last_run is None:
            message = _UNPATCHED if patch is None else _NO_RUN
            drawn, text = draw_message(*message, theme), "\n".join(message)
        else:
            facts = RunFacts.of(patch.last_run)
            drawn = draw_run(patch.last_run, facts, patch.settings.note.replace("\n", "; "), theme)
            text = report_text(patch.last_run, facts)
        text = translated(text, user_language(running_server()))
        picture = torch.from_numpy(np.asarray(drawn, dtype=np.float32) / 255)[None]
        return io.NodeOutput(samples, picture, text, ui=ui.PreviewImage(picture, cls=cls))


def report_text(run: RunRecord, facts: RunFacts) -> str:
    """The report in English, a fact on each line."""
    if run.unused_cause:
        return "\n".join([f"PSA {run.title}", *run.summary()])
    lines = [f"PSA {run.title}", run.comparison, f"{run.sparse_steps} of {run.steps} steps sparse"]
    if run.density is not None:
        lines.append(f"mean density {run.density:.2f} ({run.backend})")
    lines += [f"{run.tokens} tokens", f"sparse calls: {run.sparse_calls}, dense: {sum(run.dense_calls.values())}"]
    lines += [f"dense: {count} {reason}" for reason, count in most_first(run.dense_calls)]
    if facts.level_shares.any():
        pairs = zip(run.levels, facts.level_shares, strict=True)
        lines += [f"block pairs at level {level}: {share:.1%}" for level, share in pairs]
    if run.calls:
        lines.append(f"in sparse calls: {seconds_text(facts.sparse_seconds)}")
        lines.append(f"in dense calls: {seconds_text(facts.dense_seconds)}")
    if facts.estimate is not None:
        lines.append(f"the sparse calls if dense, estimated: {seconds_text(facts.estimate)}")
    if facts.unmatched:
        lines.append(
            f"the sparse calls if dense: no estimate, as no dense call like {facts.unmatched} of them was timed"
        )
    lines.append(f"{run.outcome} after {run.seconds:.1f} s")
    return "\n".join(filter(None, lines))
