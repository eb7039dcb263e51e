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
        schedule: {start_percent: 0.2, dense_blocks: "0, -1", min_tokens: 8192}

With ``selection: topk`` or ``threshold``, ``levels`` maps each level to its range: ``{1: [0, 0.4], skip: [0.4, 1]}``,
and ``similarity_caps`` maps each pooled level to its least similarity: ``{2: 0.7, 4: 0.65, 8: 0.6}``.
What a preset does not mention takes the default of :class:`PSAConfig` or :class:`Schedule`.

A file in the form of the official ``attention_config.yaml`` is read too; its presets are named ``model.preset``.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Hashable, Iterable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import yaml

from . import official_presets
from .config import PSAConfig
from .schedule import BlockList, Schedule

MAX_FILE_BYTES = 32 * 1024  # eight times the longest bundled file; the densest YAML of this size takes half a second
MAX_MESSAGE = 600

_FILE_KEYS = ("family", "description", "source", "presets")
_CONFIG_KEYS = (
    "selection",
    "levels",
    "error_weight",
    "similarity_caps",
    "variance_term",
    "order",
    "tile",
    "query_block",
    "key_block",
    "importance_stride",
)
_PRESET_KEYS = ("description", "source", *_CONFIG_KEYS, "schedule")
_SCHEDULE_KEYS = tuple(field.name for field in fields(Schedule))
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
        schedule: Where in a sampling run attention is sparse.
    """

    name: str
    family: str
    description: str
    source: str
    config: PSAConfig
    schedule: Schedule


def load_presets(path: Path) -> dict[str, Preset]:
    """Read the presets of a file, by name and in its order.

    Raises:
        PresetError: the file is missing, unreadable, longer than 32 KiB or holds something else than presets.
    """
    try:
        with path.open("rb") as file:
            data = file.read(MAX_FILE_BYTES + 1)
    except OSError as error:
        raise PresetError(f"{path.name}: cannot be read ({error.strerror or error})") from error
    if len(data) > MAX_FILE_BYTES:
        raise PresetError(f"{path.name}: is longer than the allowed {MAX_FILE_BYTES} bytes")
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise PresetError(f"{path.name}: is not UTF-8 text ({error.reason} at byte {error.start})") from error
    return parse_presets(text, path.name)


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
        return _PresetLoader(text).get_single_data()
    except yaml.MarkedYAMLError as error:
        place = f"line {error.problem_mark.line + 1}: " if error.problem_mark else ""
        raise PresetError(f"{name}: {place}{error.problem or error.context}") from error
    except (yaml.YAMLError, ValueError, OverflowError, RecursionError) as error:
        raise PresetError(f"{name}: is not readable YAML ({error})") from error


def dump_preset(preset: Preset) -> str:
    """Write a preset as a YAML file of its own, with every setting spelled out; loading it gives the same preset."""
    config, schedule = preset.config, preset.schedule
    settings: dict[str, Any] = {"description": preset.description, "source": preset.source}
    for key in _CONFIG_KEYS:
        if (value := getattr(config, key)) is not None:
            settings[key] = list(value) if isinstance(value, tuple) else value
    if config.ranges is not None:
        settings["levels"] = {level: list(bounds) for level, bounds in zip(config.levels, config.ranges, strict=True)}
    if config.similarity_caps is not None:
        settings["similarity_caps"] = dict(config.similarity_caps)
    settings["schedule"] = {key: getattr(schedule, key) for key in _SCHEDULE_KEYS}
    settings["schedule"]["dense_blocks"] = str(schedule.dense_blocks)
    document = {"family": preset.family, "presets": {preset.name: settings}}
    return yaml.safe_dump(document, sort_keys=False, default_flow_style=None, allow_unicode=True, width=120)


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
    for key, value in given.items():
        # PSAConfig takes None for "not given"; in a file, a key without a value is a mistake.
        if value is None:
            raise ValueError(f"{key}: has no value; give one or leave the key out")
    return PSAConfig(**given)


def _schedule(settings: object) -> Schedule:
    given = dict(_mapping("schedule", settings, _SCHEDULE_KEYS))
    if "dense_blocks" in given:
        blocks = given["dense_blocks"]
        # YAML reads a lone index as a number.
        given["dense_blocks"] = BlockList.parse(str(blocks) if type(blocks) is int else blocks)
    return Schedule(**given)


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


class _PresetLoader(yaml.SafeLoader):
    """SafeLoader without anchors, aliases, tags and repeated keys, which presets never need and only errors use."""

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        event = self.peek_event()  # type: ignore[no-untyped-call]
        if getattr(event, "anchor", None) is not None:
            raise yaml.composer.ComposerError(
                None, None, "anchors (&) and aliases (*) are not allowed", event.start_mark
            )
        if getattr(event, "tag", None) is not None:
            raise yaml.composer.ComposerError(None, None, f"tags ({event.tag}) are not allowed", event.start_mark)
        return super().compose_node(parent, index)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen: set[Hashable] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, Hashable):
                raise yaml.constructor.ConstructorError(None, None, f"{key!r} cannot be a key", key_node.start_mark)
            if key in seen:
                raise yaml.constructor.ConstructorError(None, None, f"key {key!r} is given twice", key_node.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep)


# YAML 1.1, which PyYAML follows, reads 1e-3 as text; people mean the number.
_PresetLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
)
