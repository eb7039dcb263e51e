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
from .words import Words, say_lines

RUN_KEY = "psa_run"
"""Where the node's output in ComfyUI's history holds the run's numbers."""

_UNPATCHED = (Words.of("not_patched"), Words.of("patch_missing"))
_NO_RUN = (Words.of("no_run"), Words.of("sample_first"))


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
        run = None if patch is None else patch.last_run
        if patch is None or run is None:
            title, advice = lines = list(_UNPATCHED if patch is None else _NO_RUN)
            drawn = draw_message(str(title), str(advice), theme)
        else:
            facts = RunFacts.of(run)
            drawn = draw_run(run, facts, "; ".join(map(str, patch.settings.notes)), theme)
            lines = report_lines(run, facts)
        text = say_lines(lines, user_language(running_server()))
        picture = torch.from_numpy(np.asarray(drawn, dtype=np.float32) / 255)[None]
        shown = ui.PreviewImage(picture, cls=cls).as_dict()
        # For programs that queue workflows: what ComfyUI's history holds of this node.
        return io.NodeOutput(samples, picture, text, ui=shown | {RUN_KEY: [] if run is None else [run.as_json()]})


def report_lines(run: RunRecord, facts: RunFacts) -> list[Words]:
    """The report, a fact on each line."""
    title = Words.of("title", title=run.title)
    if run.unused_cause is not None:
        return [title, *run.summary()]
    lines = [title, *run.what_was_sparse(), Words.of("tokens", tokens=run.tokens)]
    lines.append(Words.of("calls", sparse=run.sparse_calls, dense=run.dense_count))
    lines += [Words.of("dense_because", count=count, reason=reason) for reason, count in most_first(run.dense_calls)]
    if facts.level_shares.any():
        pairs = zip(run.levels, facts.level_shares, strict=True)
        lines += [Words.of("pairs_at_level", level=level, share=float(share)) for level, share in pairs]
    lines += run.weights_of_steps()
    if run.calls:
        lines.append(Words.of("sparse_seconds", seconds=seconds_text(facts.sparse_seconds)))
        lines.append(Words.of("dense_seconds", seconds=seconds_text(facts.dense_seconds)))
    if facts.estimate is not None:
        lines.append(Words.of("estimate", seconds=seconds_text(facts.estimate)))
    if facts.unmatched:
        lines.append(Words.of("no_estimate", count=facts.unmatched))
    return [*lines, run.ending]
