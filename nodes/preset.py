"""PSA Preset: make or change a preset in the graph, and keep it in a file."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Any

import yaml
from comfy_api.latest import io

from ..psa_core.config import POOLED_LEVELS
from ..psa_core.presets import Preset, PresetError, dump_preset, parse_presets, read_yaml
from .preset_loader import PresetSocket, checked_preset, user_folder

KEEP = -1
FROM_BASE = "as base"

_OWN_TO_A_MODE = ("levels", "error_weight", "similarity_caps")


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
                    tooltip=(
                        "The preset to change. Without one, error_weight has to be given and the rest takes defaults."
                    ),
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
                io.Float.Input(
                    "error_weight",
                    default=KEEP,
                    min=KEEP,
                    max=1e6,
                    step=0.0001,
                    round=0.000001,
                    optional=True,
                    tooltip=(
                        "How much error a saving may cost, for selection error. Larger is faster. -1 takes the base's."
                    ),
                ),
                io.String.Input(
                    "levels",
                    default="",
                    optional=True,
                    tooltip=(
                        f"Levels in use ({levels}, block, skip). For error a list: [1, 2, 4, 8, block]. For topk and "
                        "threshold a range for each: {1: [0, 0.4], skip: [0.4, 1]}. Empty takes the base's."
                    ),
                ),
                io.Float.Input(
                    "start_percent",
                    default=KEEP,
                    min=KEEP,
                    max=1.0,
                    step=0.01,
                    optional=True,
                    tooltip="Attention turns sparse after this share of the sampling, 0 to 1. -1 takes the base's.",
                ),
                io.Float.Input(
                    "end_percent",
                    default=KEEP,
                    min=KEEP,
                    max=1.0,
                    step=0.01,
                    optional=True,
                    tooltip="Attention is dense again after this share of the sampling, 0 to 1. -1 takes the base's.",
                ),
                io.String.Input(
                    "dense_blocks",
                    default="",
                    optional=True,
                    tooltip="Transformer blocks that stay dense: 0, 1, 38-39, -1. Empty takes the base's.",
                ),
                io.Int.Input(
                    "min_tokens",
                    default=KEEP,
                    min=KEEP,
                    max=2**31 - 1,
                    optional=True,
                    tooltip="Videos with fewer tokens than this stay dense. -1 takes the base's.",
                ),
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
    ) -> io.NodeOutput:
        for parameter, text in (("levels", levels), ("dense_blocks", dense_blocks)):
            if not isinstance(text, str):  # linked from a node that gives anything
                raise PresetError(f"{parameter}: {text!r} is not text")
        settings: dict[str, Any] = {}
        if selection != FROM_BASE:
            settings["selection"] = selection
        if error_weight != KEEP:
            settings["error_weight"] = error_weight
        if levels.strip():
            settings["levels"] = _read_levels(levels)
        if order != FROM_BASE:
            settings["order"] = order
        given = {"start_percent": start_percent, "end_percent": end_percent, "min_tokens": min_tokens}
        schedule: dict[str, Any] = {key: value for key, value in given.items() if value != KEEP}
        if dense_blocks.strip():
            schedule["dense_blocks"] = dense_blocks
        preset = change_preset(base, name, settings, schedule)
        if save:
            save_preset(preset, overwrite)
        return io.NodeOutput(preset, dump_preset(preset))


def change_preset(base: Preset | None, name: str, settings: dict[str, Any], schedule: dict[str, Any]) -> Preset:
    """Make a preset out of another one.

    Args:
        base: The preset to change; None for the defaults.
        name: Name of the new one.
        settings: What differs, written as in a preset file. Another ``selection`` drops the levels and weights of the
            old one.
        schedule: What differs in the schedule, likewise.

    Raises:
        PresetError: naming the parameter, its value and what is allowed.
    """
    if base is None:
        document: dict[str, Any] = {"family": "own", "presets": {"base": {}}}
    else:
        document = yaml.safe_load(dump_preset(checked_preset("base", base)))
    (old,) = document["presets"].values()
    if settings.get("selection", old.get("selection")) != old.get("selection"):
        for key in _OWN_TO_A_MODE:
            old.pop(key, None)
    if settings.get("order", old.get("order")) != old.get("order"):
        old.pop("tile", None)
    if settings or schedule:
        old["source"] = f"changed from {base.family} {base.name}" if base else "made in the graph"
    changed = {**old, **settings, "schedule": {**old.get("schedule", {}), **schedule}}
    document["presets"] = {name: changed}
    return parse_presets(yaml.safe_dump(document, sort_keys=False), "PSA Preset")[name]


def save_preset(preset: Preset, overwrite: bool) -> Path:
    """Write a preset to a file of its own in the user's preset folder; a file that says the same is left alone.

    Raises:
        ValueError: another file of that name is there, or the folder cannot be written; the message has the path.
    """
    path = user_folder() / f"{preset.name}.yaml"
    text = dump_preset(preset)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists() and not overwrite:
            if path.read_text(encoding="utf-8") == text:
                return path
            raise ValueError(f"name: {path} is there already; take another name or set overwrite")
        # Whole or not at all: a full disk must not cost the file that was there.
        with tempfile.TemporaryDirectory(dir=path.parent) as folder:
            written = Path(folder) / path.name
            written.write_text(text, encoding="utf-8")
            os.replace(written, path)
    except OSError as error:
        raise ValueError(f"save: {path} cannot be written ({error.strerror or error})") from error
    return path


def _read_levels(text: str) -> Any:
    try:
        return read_yaml(text, "levels")
    except PresetError:
        raise PresetError(
            f"levels: {text!r} is neither a list such as [1, 2, 4, 8, block] nor ranges such as "
            "{1: [0, 0.4], skip: [0.4, 1]}"
        ) from None
