"""Presets: named settings for a model family, in YAML files that anyone can write.

A file holds one family::

    family: wan2.1_14b
    description: What the family is.
    source: Where the numbers come from.
    presets:
      balanced:
        selection: error
        levels: [1, 2, 4, 8, block]
        error_weight: 0.002
        group_keys: true
        schedule: {dense_blocks: "-1", min_tokens: 8192, ramp: 1, block_weights: {"0, 3-5": 0.3}}
        expected_work: 0.25

With ``selection: error``, the schedule's ``ramp`` and ``block_weights`` multiply the ``error_weight``: ``ramp: 1`` by
the share of the sampling that is done, a block's factor in that block (``"vace: 0"`` is one of the stack ``vace``).
``expected_work`` is what was measured with just these settings: the mean share of the dense work over all
self-attention calls of a whole video, a dense call counting 1. It is shown, nothing else.
With ``selection: topk`` or ``threshold``, ``levels`` maps each level to its range: ``{1: [0, 0.4], skip: [0.4, 1]}``,
and ``similarity_caps`` maps each pooled level to its least similarity: ``{2: 0.7, 4: 0.65, 8: 0.6}``.
What a preset does not mention takes the default of :class:`PSAConfig` or :class:`Schedule`. Plain values are read
as in YAML 1.2: ``010`` is ten, ``1e-3`` a number, ``1:30`` and ``off`` are text.

A file in the form of the official ``attention_config.yaml`` is read too; its presets are named ``model.preset``.
"""

from __future__ import annotations

import dataclasses
import logging
import os
import re
import stat
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from . import official_presets, yaml_text
from .config import PSAConfig
from .schedule import BlockList, BlockWeights, Schedule

MAX_FILE_BYTES = 32 * 1024  # eight times the longest bundled file; the densest YAML of this size takes half a second
MAX_MESSAGE = 600

_FILE_KEYS = ("family", "description", "source", "presets")
_CONFIG_KEYS = (
    "selection",
    "levels",
    "error_weight",
    "similarity_caps",
    "group_keys",
    "variance_term",
    "order",
    "tile",
    "query_block",
    "key_block",
    "group_keys",
    "importance_group",
    "importance_stride",
)
_PRESET_KEYS = ("description", "source", *_CONFIG_KEYS, "schedule", "expected_work")
_SCHEDULE_KEYS = tuple(field.name for field in fields(Schedule))
_OWN_TO_A_SELECTION = ("levels", "error_weight", "similarity_caps")
_OWN_TO_ERROR = ("ramp", "block_weights")  # of a schedule
_NAME = re.compile(r"[A-Za-z0-9._-]{1,64}")

_log = logging.getLogger(__name__)


class PresetError(ValueError):
    """A preset file cannot be used; the message names file, preset, parameter, value and what is allowed.

    Args:
        message: Shortened in the middle, where a long value stands, so that both ends can be read.
    """

    def __init__(self, message: str) -> None:
        message = message.encode("utf-8", "backslashreplace").decode()  # half a character cannot be shown
        half = MAX_MESSAGE // 2
        super().__init__(message if len(message) <= MAX_MESSAGE else f"{message[:half]} ... {message[-half:]}")


@dataclass(frozen=True)
class Preset:
    """Settings of one name in one model family.

    Args:
        name: Its name in the file, such as ``balanced``.
        family: Model family that it was made for, such as ``wan2.1_14b``.
        description: One sentence for the user.
        source: Where its numbers come from.
        config: Settings of every sparse attention call.
        schedule: Where in a sampling run attention is sparse, and how the error weight varies there.
        expected_work: Mean share of the dense work over all self-attention calls of a whole video, where it was
            measured with these settings, from 0 to 1; None where not.

    Raises:
        ValueError: naming the parameter, its value and what is allowed.
    """

    name: str
    family: str
    description: str
    source: str
    config: PSAConfig
    schedule: Schedule
    expected_work: float | None = None

    def __post_init__(self) -> None:
        if self.config.selection != "error":
            for key in _OWN_TO_ERROR:
                if value := getattr(self.schedule, key):
                    shown = value.named() if isinstance(value, BlockWeights) else value
                    raise ValueError(
                        f"{key}: {shown!r} has no meaning with selection {self.config.selection!r}, only with 'error'"
                    )
        work = self.expected_work
        if work is not None and (isinstance(work, bool) or not isinstance(work, (int, float)) or not 0 < work <= 1):
            raise ValueError(f"expected_work: {work!r} is not a share of the dense work, above 0 and at most 1")


def load_presets(path: Path) -> dict[str, Preset]:
    """Read the presets of a file, by name and in its order.

    Raises:
        PresetError: the file is missing, unreadable, longer than 32 KiB or holds something else than presets.
    """
    try:
        text = read_file(path).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise PresetError(f"{path.name}: is not UTF-8 text ({error.reason} at byte {error.start})") from error
    return parse_presets(text, path.name)


def read_file(path: Path) -> bytes:
    """Read the bytes of a preset file.

    Raises:
        PresetError: the file is missing, unreadable, no regular file or longer than 32 KiB.
    """
    try:
        with open(path, "rb", opener=_open_at_once) as file:
            if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                raise PresetError(f"{path.name}: cannot be read (it is no regular file)")
            data = file.read(MAX_FILE_BYTES + 1)
    except OSError as error:
        raise PresetError(f"{path.name}: cannot be read ({error.strerror or type(error).__name__})") from error
    if len(data) > MAX_FILE_BYTES:
        raise PresetError(f"{path.name}: is longer than the allowed {MAX_FILE_BYTES} bytes")
    return data


def parse_presets(text: str, file: str) -> dict[str, Preset]:
    """Read the presets of a YAML text, by name and in its order.

    Args:
        text: The YAML.
        file: Name that errors give the text.

    Raises:
        PresetError: the text holds something else than presets.
    """
    document = read_yaml(text, file)
    if official_presets.is_official(document):
        return _official(document, file)
    try:
        top = _mapping("file", document, _FILE_KEYS)
        family = _name("family", top.get("family"))
        _text("description", top.get("description", ""))
        source = _text("source", top.get("source", ""))
        named = top.get("presets")
        if not isinstance(named, dict) or not named:
            raise ValueError(f"presets: {named!r} is not a mapping of at least one name to its settings")
        for name in named:
            _name("preset name", name)
    except ValueError as error:
        raise PresetError(f"{file}: {error}") from error
    presets = {}
    for name, settings in named.items():
        try:
            presets[name] = _preset(name, family, source, settings)
        except ValueError as error:
            raise PresetError(f"{file}: preset {name!r}: {error}") from error
    return presets


def read_yaml(text: str, name: str) -> Any:
    """Read the one document of a YAML text, without anchors, aliases, tags and repeated keys.

    Args:
        text: The YAML.
        name: Name that errors give the text.

    Raises:
        PresetError: the text is longer than 32 Ki characters or no such YAML.
    """
    if len(text) > MAX_FILE_BYTES:
        raise PresetError(f"{name}: is longer than the allowed {MAX_FILE_BYTES} characters")
    try:
        return yaml_text.read(text)
    except ValueError as error:
        raise PresetError(f"{name}: {error}") from error


def dump_preset(preset: Preset) -> str:
    """Write a preset as a YAML file of its own, with every setting spelled out; loading it gives the same preset."""
    settings = {
        "description": preset.description,
        "source": preset.source,
        **_config_settings(preset.config),
        "schedule": _schedule_settings(preset.schedule),
    }
    if preset.expected_work is not None:
        settings["expected_work"] = preset.expected_work
    document = {"family": preset.family, "presets": {preset.name: settings}}
    return yaml_text.write(document)


def change(
    preset: Preset,
    settings: Mapping[str, Any],
    schedule: Mapping[str, Any],
    name: str | None = None,
    source: str | None = None,
) -> Preset:
    """Make a preset out of another one. Of one whose settings differ, no work is expected any more.

    Args:
        preset: The preset to change.
        settings: What differs, as a preset file says it. Another ``selection`` drops the levels, weights and caps of
            the old one, with its ramp and block weights, another ``order`` its tile.
        schedule: What differs in the schedule, likewise; ``dense_blocks`` may be a :class:`BlockList`,
            ``block_weights`` a :class:`BlockWeights`.
        name: Name of the new one, where it has another.
        source: Where its numbers come from; not given, a preset that differs says what it was changed from.

    Raises:
        PresetError: naming the parameter, its value and what is allowed.
    """
    kept, kept_schedule = _config_settings(preset.config), _schedule_settings(preset.schedule)
    if settings.get("selection", preset.config.selection) != preset.config.selection:
        kept = {key: value for key, value in kept.items() if key not in _OWN_TO_A_SELECTION}
        kept_schedule = {key: value for key, value in kept_schedule.items() if key not in _OWN_TO_ERROR}
    if settings.get("order", preset.config.order) != preset.config.order:
        kept.pop("tile", None)
    if source is None:
        source = f"changed from {preset.family} {preset.name}" if settings or schedule else preset.source
    try:
        config = _config({**kept, **_mapping("settings", dict(settings), _CONFIG_KEYS)})
        config = dataclasses.replace(config, workspace_mib=preset.config.workspace_mib)
        changed = _schedule({**kept_schedule, **schedule})
        same = (config, changed) == (preset.config, preset.schedule)
        return dataclasses.replace(
            preset,
            name=preset.name if name is None else _name("name", name),
            source=source,
            config=config,
            schedule=changed,
            expected_work=preset.expected_work if same else None,
        )
    except ValueError as error:
        raise PresetError(str(error)) from error


def _config_settings(config: PSAConfig) -> dict[str, Any]:
    """A config as a preset file says it."""
    settings: dict[str, Any] = {}
    for key in _CONFIG_KEYS:
        if (value := getattr(config, key)) is not None:
            settings[key] = list(value) if isinstance(value, tuple) else value
    if config.ranges is not None:
        settings["levels"] = {level: list(bounds) for level, bounds in zip(config.levels, config.ranges, strict=True)}
    if config.similarity_caps is not None:
        settings["similarity_caps"] = dict(config.similarity_caps)
    return settings


def _schedule_settings(schedule: Schedule) -> dict[str, Any]:
    """A schedule as a preset file says it."""
    settings = {key: getattr(schedule, key) for key in _SCHEDULE_KEYS}
    return settings | {"dense_blocks": str(schedule.dense_blocks), "block_weights": schedule.block_weights.named()}


def _official(document: Mapping[str, Any], file: str) -> dict[str, Preset]:
    """Presets of a file in the official form, by ``model.preset``."""
    try:
        translated, ignored = official_presets.translate(document)
        if not translated:
            raise ValueError("attention_configs: there is no preset of type psa")
    except ValueError as error:
        raise PresetError(f"{file}: {error}") from error
    presets = {}
    for official in translated:
        try:
            family, name = _name("model", official.model), _name("preset name", official.name)
            presets[f"{family}.{name}"] = _preset(name, family, "", official.settings)
        except ValueError as error:
            raise PresetError(f"{file}: {official.model}: preset {official.name!r}: {error}") from error
    if ignored:
        _log.warning("PSA: %s: left out, because it has no meaning here: %s", file, ", ".join(ignored))
    return presets


def _preset(name: str, family: str, source: str, settings: object) -> Preset:
    given = _mapping("settings", settings, _PRESET_KEYS)
    return Preset(
        name=name,
        family=family,
        description=_text("description", given.get("description", "")),
        source=_text("source", given.get("source", source)),
        config=_config({key: given[key] for key in _CONFIG_KEYS if key in given}),
        schedule=_schedule(given.get("schedule", {})),
        expected_work=_given("expected_work", given) if "expected_work" in given else None,
    )


def _config(given: dict[str, Any]) -> PSAConfig:
    levels = given.get("levels")
    if isinstance(levels, dict):
        if given.get("selection", "error") == "error":
            raise ValueError(
                f"levels: {levels!r} gives ranges; selection 'error' takes a list such as [1, 2, 4, 8, block]"
            )
        given["levels"] = tuple(levels)
        given["ranges"] = tuple(_tuple(bounds) for bounds in levels.values())
    elif given.get("selection", "error") in ("topk", "threshold"):
        raise ValueError(
            f"levels: {levels!r} gives no ranges; selection {given['selection']!r} takes a mapping such as "
            "{1: [0, 0.4], skip: [0.4, 1]}"
        )
    elif "levels" in given:
        given["levels"] = _tuple(levels)
    if isinstance(given.get("similarity_caps"), dict):
        given["similarity_caps"] = tuple(given["similarity_caps"].items())
    if "tile" in given:
        given["tile"] = _tuple(given["tile"])
    return PSAConfig(**{key: _given(key, given) for key in given})


def _schedule(settings: object) -> Schedule:
    given = dict(_mapping("schedule", settings, _SCHEDULE_KEYS))
    if "dense_blocks" in given:
        blocks = given["dense_blocks"]
        if not isinstance(blocks, BlockList):
            # YAML reads a lone index as a number.
            given["dense_blocks"] = BlockList.parse(str(blocks) if type(blocks) is int else blocks)
    if not isinstance(given.get("block_weights", BlockWeights()), BlockWeights):
        given["block_weights"] = BlockWeights.parse(given["block_weights"])
    return Schedule(**given)


def _given(key: str, settings: Mapping[str, Any]) -> Any:
    """A value of a file, where a key without one is a mistake: the classes take None for "not given"."""
    if settings[key] is None:
        raise ValueError(f"{key}: has no value; give one or leave the key out")
    return settings[key]


def _mapping(name: str, value: object, allowed: Iterable[str]) -> Mapping[str, Any]:
    if not isinstance(value, dict):
        raise ValueError(f"{name}: {value!r} is not a mapping of {', '.join(allowed)}")
    for key in value:
        if key not in allowed:
            raise ValueError(f"{name}: unknown key {key!r}; allowed are {', '.join(allowed)}")
    return value


def _text(key: str, value: object) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{key}: {value!r} is not text; put quotes around it")
    return value


def _name(key: str, value: object) -> str:
    if not isinstance(value, str) or not _NAME.fullmatch(value):
        raise ValueError(f"{key}: {value!r} is not a name of 1 to 64 letters, digits, '.', '_' or '-'")
    return value


def _tuple(value: object) -> Any:
    return tuple(value) if isinstance(value, list) else value


def _open_at_once(path: str, flags: int) -> int:
    """Open without waiting for the other end of a pipe (where there are such)."""
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0))
