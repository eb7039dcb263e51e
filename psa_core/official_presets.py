"""The official ``attention_config.yaml`` of PSA, told in the words of this project's preset files.

Its top level names models; each has ``attention_configs``, named presets of ``type`` psa or dense.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from .models.wan import FAMILIES

_SELECTIONS = {"topk": "topk", "thresholdbound": "threshold"}
_ORDERS = {"Gilbert": "gilbert", "STA": "tile"}
_LEVELS: dict[int, int | str] = {1: 1, 2: 2, 4: 4, 8: 8, 0: "skip"}

_MODEL_KEYS = ("default_attention", "video_scale", "text_length", "attention_configs")
_VIDEO_SCALE_KEYS = ("width_divisor", "height_divisor", "depth_divisor")
_REQUIRED_KEYS = ("use_rearrange", "block_size", "mask_ratios", "mask_mode", "warmup_steps")
_OPTIONAL_KEYS = ("use_sim_mask", "sim_thresholds", "rearrange_method", "tile_size", "attn_impl", "verbose")
_PRESET_KEYS = ("type", "description", *_REQUIRED_KEYS, *_OPTIONAL_KEYS)
_USUAL_STEPS = 50


@dataclass(frozen=True)
class TranslatedPreset:
    """One official preset of one model.

    Args:
        model: Name of the model in the file, such as ``Wan2.1_14b``.
        name: Name of the preset, such as ``psa_balanced``.
        settings: What a preset of this project says under its name.
    """

    model: str
    name: str
    settings: dict[str, Any]


def is_official(document: object) -> bool:
    """Whether a YAML document has the official form."""
    return isinstance(document, dict) and any(
        isinstance(model, dict) and "attention_configs" in model for model in document.values()
    )


def translate(document: Mapping[str, Any]) -> tuple[list[TranslatedPreset], list[str]]:
    """Translate a document of the official form.

    Returns:
        The presets, and the names of everything in the document that has no meaning here.

    Raises:
        ValueError: naming model, preset, parameter, value and what is allowed. The values that presets of this project
            have too are left for their own check.
    """
    presets: list[TranslatedPreset] = []
    ignored: dict[str, None] = {}
    for model, entry in document.items():
        try:
            _check_keys("model", entry, _MODEL_KEYS)
            _check_keys("video_scale", entry.get("video_scale", {}), _VIDEO_SCALE_KEYS)
            _check_keys("attention_configs", entry.get("attention_configs"))
        except ValueError as error:
            raise ValueError(f"{model}: {error}") from error
        ignored.update(dict.fromkeys(key for key in _MODEL_KEYS[:-1] if key in entry))
        for name, given in entry["attention_configs"].items():
            try:
                settings, unused = _translate_preset(str(model), given)
            except ValueError as error:
                raise ValueError(f"{model}: preset {name!r}: {error}") from error
            ignored.update(dict.fromkeys(unused))
            if settings is not None:
                presets.append(TranslatedPreset(model, name, settings))
    return presets, list(ignored)


def _translate_preset(model: str, given: object) -> tuple[dict[str, Any] | None, list[str]]:
    """Settings, None for a dense preset, and the keys that have no meaning."""
    preset = _check_keys("settings", given, _PRESET_KEYS)
    kind = _one_of("type", preset.get("type"), ("psa", "dense"))
    if kind == "dense":
        return None, ["presets of type dense (PSA Attention Patch has 'off')"]
    for key in _REQUIRED_KEYS:
        if key not in preset:
            raise ValueError(f"{key}: is missing")
    unused = [key for key in ("attn_impl", "verbose") if key in preset]
    blocks = _check_keys("block_size", preset["block_size"], ("m", "n", "tile_n"))
    unused += ["tile_n"] if "tile_n" in blocks else []
    settings: dict[str, Any] = {
        "description": preset.get("description", ""),
        "source": f"the user's file in the official form, for {model}; importance is estimated as PSA for ComfyUI does",
        "selection": _SELECTIONS[_one_of("mask_mode", preset["mask_mode"], tuple(_SELECTIONS))],
        "levels": _levels(preset["mask_ratios"]),
        "variance_term": False,
        "order": "raster",
        "query_block": blocks.get("m"),
        "key_block": blocks.get("n"),
        "schedule": {"start_percent": _start_percent(model, preset["warmup_steps"])},
    }
    if _flag("use_rearrange", preset["use_rearrange"]):
        settings["order"] = _ORDERS[_one_of("rearrange_method", preset.get("rearrange_method"), tuple(_ORDERS))]
    elif "rearrange_method" in preset:
        unused.append("rearrange_method without use_rearrange")
    if settings["order"] == "tile":
        settings["tile"] = preset.get("tile_size")
    elif "tile_size" in preset:
        unused.append("tile_size without rearrange_method STA")
    if _flag("use_sim_mask", preset.get("use_sim_mask", False)):
        thresholds = _check_keys("sim_thresholds", preset.get("sim_thresholds"), ("x2", "x4", "x8"))
        pooled = [level for level in settings["levels"] if level in (2, 4, 8)]
        settings["similarity_caps"] = {level: thresholds.get(f"x{level}") for level in pooled}
    elif "sim_thresholds" in preset:
        unused.append("sim_thresholds without use_sim_mask")
    return settings, unused


def _levels(ratios: object) -> dict[int | str, Any]:
    """Levels from fine to coarse with their ranges; an empty range means that the level is not used."""
    given = _check_keys("mask_ratios", ratios, tuple(_LEVELS))
    used: dict[int | str, Any] = {}
    for level, ours in _LEVELS.items():
        bounds = given.get(level)
        if bounds is not None and not (isinstance(bounds, list) and len(bounds) == 2 and bounds[0] == bounds[1]):
            used[ours] = bounds
    return used


def _start_percent(model: str, warmup_steps: object) -> float:
    """Share of the sampling that is dense: the official code counts steps of the model's official number of steps."""
    steps = {family.preset_family: family.official_steps for family in FAMILIES}.get(model.lower(), _USUAL_STEPS)
    if not isinstance(warmup_steps, int) or isinstance(warmup_steps, bool) or not 0 <= warmup_steps < steps:
        raise ValueError(f"warmup_steps: {warmup_steps!r} is not a whole number from 0 to {steps - 1}")
    return warmup_steps / steps


def _check_keys(name: str, value: object, allowed: tuple[object, ...] | None = None) -> Mapping[Any, Any]:
    if not isinstance(value, dict):
        raise ValueError(f"{name}: {value!r} is not a mapping")
    for key in value:
        if allowed is not None and key not in allowed:
            raise ValueError(f"{name}: unknown key {key!r}; allowed are {', '.join(map(str, allowed))}")
    return value


def _one_of(name: str, value: object, allowed: tuple[str, ...]) -> str:
    if not isinstance(value, str) or value not in allowed:
        raise ValueError(f"{name}: {value!r} is not one of {', '.join(allowed)}")
    return value


def _flag(name: str, value: object) -> bool:
    if not isinstance(value, bool):
        raise ValueError(f"{name}: {value!r} is not true or false")
    return value
