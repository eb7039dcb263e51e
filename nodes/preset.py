"""PSA Preset: make or change a preset in the graph, and keep it in a file."""

from __future__ import annotations

import dataclasses
import os
import tempfile
from pathlib import Path
from typing import Any

from comfy_api.latest import io

from ..psa_core.config import POOLED_LEVELS
from ..psa_core.presets import MAX_FILE_BYTES, Preset, PresetError, change, dump_preset, read_file, read_yaml
from ..psa_core.schedule import MAX_RAMP
from .preset_loader import PresetSocket, checked_preset, load_preset, own_file, shown_path
from .schedule_inputs import KEEP, error_weight_input, given_schedule, given_settings, schedule_inputs

FROM_BASE = "as base"
_SWITCH = {"on": True, "off": False}
STANDARD = "wan2.1_14b/balanced"
"""The bundled preset that is changed where no other is."""


class PSAPreset(io.ComfyNode):
    """Makes a preset out of another one and the values given here."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        levels = ", ".join(map(str, POOLED_LEVELS))
        return io.Schema(
            node_id="PSAPreset",
            display_name="PSA Preset",
            category="model/patch",
            description=(
                "Makes a PSA preset, or changes one, for the custom_preset input of PSA Attention Patch. It can be "
                "saved to the folder psa_presets inside ComfyUI's user folder, where PSA Preset Loader finds it."
            ),
            inputs=[
                io.String.Input(
                    "name",
                    default="mine",
                    tooltip="Name of the new preset and of its file: 1 to 64 letters, digits, '.', '_' or '-'.",
                ),
                PresetSocket.Input(
                    "base",
                    optional=True,
                    tooltip=f"The preset to change. Without one, the bundled {STANDARD}.",
                ),
                io.Combo.Input(
                    "selection",
                    options=[FROM_BASE, "error", "topk", "threshold"],
                    default=FROM_BASE,
                    optional=True,
                    tooltip=(
                        "How levels are chosen. error: by the predicted error, best for quality. topk: by the rank of "
                        "a block's importance. threshold: by the importance that ranks before it."
                    ),
                ),
                error_weight_input("the base's"),
                io.String.Input(
                    "levels",
                    default="",
                    optional=True,
                    tooltip=(
                        f"Levels in use ({levels}, block, skip). For error a list: [1, 2, 4, 8, block]. For topk and "
                        "threshold a range for each: {1: [0, 0.4], skip: [0.4, 1]}. Empty takes the base's."
                    ),
                ),
                *schedule_inputs("the base's"),
                io.Combo.Input(
                    "order",
                    options=[FROM_BASE, "gilbert", "tile", "raster"],
                    default=FROM_BASE,
                    optional=True,
                    tooltip="Curve along which the video's tokens are laid out before they are cut into blocks.",
                ),
                io.Boolean.Input(
                    "save", default=False, optional=True, tooltip="Write the preset to psa_presets as NAME.yaml."
                ),
                io.Boolean.Input(
                    "overwrite",
                    default=False,
                    optional=True,
                    tooltip="Replace a file of that name. Otherwise a file that differs is kept and the node says so.",
                ),
                *_advanced_inputs(),  # last: a saved workflow holds values by their place
            ],
            outputs=[
                PresetSocket.Output(
                    "psa_preset", display_name="preset", tooltip="The preset, for custom_preset of PSA Attention Patch."
                ),
                io.String.Output("yaml", display_name="yaml", tooltip="The preset as the text of a preset file."),
            ],
            is_output_node=True,
        )

    @classmethod
    def execute(
        cls,
        name: str,
        base: Preset | None = None,
        selection: str = FROM_BASE,
        error_weight: float = KEEP,
        levels: str = "",
        start_percent: float = KEEP,
        end_percent: float = KEEP,
        dense_blocks: str = "",
        min_tokens: int = KEEP,
        order: str = FROM_BASE,
        save: bool = False,
        overwrite: bool = False,
        ramp: float = KEEP,
        group_keys: str = FROM_BASE,
    ) -> io.NodeOutput:
        if not isinstance(levels, str):  # linked from a node that gives anything
            raise PresetError(f"levels: {levels!r} is not text")
        settings = given_settings(error_weight)
        if selection != FROM_BASE:
            settings["selection"] = selection
        if levels.strip():
            settings["levels"] = _read_levels(levels)
        if order != FROM_BASE:
            settings["order"] = order
        if group_keys != FROM_BASE:
            settings["group_keys"] = _read_switch("group_keys", group_keys)
        schedule = given_schedule(start_percent, end_percent, dense_blocks, min_tokens)
        if ramp != KEEP:
            schedule["ramp"] = ramp
        start = _standard() if base is None else checked_preset("base", base)
        preset = change(start, settings, schedule, name=name)
        if save:
            save_preset(preset, overwrite)
        return io.NodeOutput(preset, dump_preset(preset))


def _advanced_inputs() -> list[io.WidgetInput]:
    widgets: list[io.WidgetInput] = [
        io.Float.Input(
            "ramp",
            default=KEEP,
            min=KEEP,
            max=MAX_RAMP,
            step=0.1,
            optional=True,
            tooltip=(
                "How error_weight grows while the video is sampled. 0: one weight for all steps. 1: in proportion to "
                "the share of the sampling that is done, so that the first steps, which decide the composition, are "
                "nearly exact. Only for selection error. -1 takes the base's."
            ),
        ),
        io.Combo.Input(
            "group_keys",
            options=[FROM_BASE, *_SWITCH],
            default=FROM_BASE,
            optional=True,
            tooltip=(
                "Sort the keys of every block by content before they are averaged, so that what is averaged is alike: "
                "less error for the same work. Not together with similarity_caps."
            ),
        ),
    ]
    for widget in widgets:
        # ComfyUI 0.3.x has no `advanced` argument, but passes this on all the same.
        widget.extra_dict["advanced"] = True
    return widgets


def save_preset(preset: Preset, overwrite: bool) -> Path:
    """Write a preset to a file of its own in the user's preset folder; a file that says the same is left alone.

    Raises:
        ValueError: another file of that name is there, or the folder cannot be written.
    """
    path, data = own_file(preset.name), dump_preset(preset).encode()
    if len(data) > MAX_FILE_BYTES:
        raise ValueError(f"save: {shown_path(path)} would be longer than the allowed {MAX_FILE_BYTES} bytes")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if os.path.lexists(path) and not overwrite:  # a link to nowhere is there as well
            if _holds(path, data):
                return path
            raise ValueError(f"name: {shown_path(path)} is there already; take another name or set overwrite")
        # Whole or not at all: a full disk must not cost the file that was there.
        with tempfile.TemporaryDirectory(dir=path.parent) as folder:
            written = Path(folder) / path.name
            written.write_bytes(data)
            os.replace(written, path)
    except OSError as error:
        raise ValueError(
            f"save: {shown_path(path)} cannot be written ({error.strerror or type(error).__name__})"
        ) from error
    return path


def _standard() -> Preset:
    return dataclasses.replace(load_preset(STANDARD), family="own", description="", source="made in the graph")


def _holds(path: Path, data: bytes) -> bool:
    try:
        return read_file(path) == data
    except PresetError:  # no regular file, or one that no preset was written to
        return False


def _read_switch(name: str, value: object) -> bool:
    if not isinstance(value, str) or value not in _SWITCH:  # a link may bring anything
        raise PresetError(f"{name}: {value!r} is not one of {', '.join((FROM_BASE, *_SWITCH))}")
    return _SWITCH[value]


def _read_levels(text: str) -> Any:
    try:
        return read_yaml(text, "levels")
    except PresetError:
        raise PresetError(
            f"levels: {text!r} is neither a list such as [1, 2, 4, 8, block] nor ranges such as "
            "{1: [0, 0.4], skip: [0.4, 1]}"
        ) from None
