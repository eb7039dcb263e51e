"""Preset files: what they mean, and what is refused."""

from __future__ import annotations

import dataclasses
import json
import os
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from psa_pack.psa_core.config import PSAConfig
from psa_pack.psa_core.models import cogvideox
from psa_pack.psa_core.models.wan import FAMILIES, WAN21_1_3B, WAN21_14B, WAN22_A14B, Detected, detect_family
from psa_pack.psa_core.presets import (
    MAX_FILE_BYTES,
    Preset,
    PresetError,
    change,
    dump_preset,
    load_presets,
    parse_presets,
)
from psa_pack.psa_core.schedule import BlockList, BlockWeights, Schedule

from conftest import ROOT

NAMES = ("balanced", "quality", "fast")
BUNDLED = sorted((ROOT / "presets").glob("*.yaml"))


def preset_text(settings: str) -> str:
    return f"family: wan2.1_14b\nsource: a test\npresets:\n  mine: {{{settings}}}\n"


RANKED = "selection: topk, levels: {1: [0, 0.5], skip: [0.5, 1]}"
WEIGHTS = BlockWeights.parse({"0, 3-5": 0.3, "-1": 2, "vace: 0": 0})


def parse(settings: str) -> Preset:
    return parse_presets(preset_text(settings), "mine.yaml")["mine"]


@pytest.mark.parametrize("path", BUNDLED, ids=lambda path: path.stem)
def test_bundled_presets_load_and_say_where_they_come_from(path: Path) -> None:
    presets = load_presets(path)
    assert list(presets)[:3] == ["balanced", "quality", "fast"]
    for name, preset in presets.items():
        assert (preset.name, preset.family) == (name, path.stem)
        assert preset.description
        official = name.startswith("official_")
        assert ("the official attention_config.yaml" if official else "until measured on yours") in preset.source
        assert preset.config.group_keys == (name in (*NAMES, "four_steps"))
    weights = [presets[name].config.error_weight for name in ("quality", "balanced", "fast")]
    assert weights == sorted(set(weights))  # type: ignore[type-var]
    assert (presets["four_steps"].schedule.ramp, presets["four_steps"].schedule.start_percent) == (0, 0)


@pytest.mark.parametrize(
    ("name", "weight", "start"),
    [("balanced_1", 0.0017, 0.2), ("quality_1", 0.0006, 0.3), ("fast_1", 0.005, 0.1), ("four_steps_1", 0.0017, 0.0)],
)
@pytest.mark.parametrize("path", BUNDLED, ids=lambda path: path.stem)
def test_the_presets_of_the_first_version_are_what_they_were(
    path: Path, name: str, weight: float, start: float
) -> None:
    preset = load_presets(path)[name]
    assert preset.config == PSAConfig(error_weight=weight)
    assert preset.schedule == Schedule(start_percent=start, min_tokens=8192)
    assert preset.expected_work is None


CASES = {
    "wan2.1_1.3b": "wan2.1_1.3b_480p_81f", "wan2.1_14b": "wan2.1_14b_720p_81f", "wan2.2_a14b": "wan2.1_14b_720p_81f",
    "wan2.2_5b": "wan2.2_5b_704p_121f", "cogvideox_5b": "cogvideox_5b_480p_49f",
    "cogvideox1.5_5b": "cogvideox1.5_5b_768p_81f",
}  # fmt: skip


@pytest.mark.parametrize("name", [f"{name}_1" for name in NAMES])
@pytest.mark.parametrize("path", BUNDLED, ids=lambda path: path.stem)
def test_figures_of_a_preset_are_those_of_the_results(path: Path, name: str) -> None:
    results = json.loads((ROOT / "benchmarks/results/attention-nvidia-h100-80gb-hbm3.json").read_text())
    records = {(r["case"], r["input"], r["method"], r["preset"]): r for r in results["records"]}
    measured = name if any(r["preset"] == name for r in results["records"]) else name.removesuffix("_1")

    def listed(key: str, digits: int) -> str:
        learned = [records["wan2.1_1.3b_480p_81f", f"learned {noise}", "psa", measured] for noise in (0.9, 0.6, 0.3)]
        return " / ".join(f"{record[key]:.{digits}f}".lstrip("0") for record in learned)

    source = load_presets(path)[name].source
    synthetic = records[CASES[path.stem], "structured", "psa", measured]
    dense = records[CASES[path.stem], "structured", "cudnn", ""]
    assert f"density {listed('density', 2)}, error {listed('rel_l2', 3)}," in source
    assert f"{synthetic['ms']:.1f} ms a call instead of {dense['ms']:.1f}." in source


SKIP_FROM_80 = ((0.7, 0.8), (0.8, 1))

# family, preset, selection, query and key block, levels but skip, ranges, similarity caps, dense steps of all
OFFICIAL = [
    ("wan2.1_14b", "official_balanced", "threshold", 128, 128, (1, 2, 4, 8),
     ((0, 0.4), (0.4, 0.5), (0.5, 0.6), (0.6, 0.8), (0.8, 1)), None, 15 / 50),
    ("wan2.1_1.3b", "official_balanced", "threshold", 128, 128, (1, 2, 4, 8),
     ((0, 0.5), (0.5, 0.6), (0.6, 0.7), *SKIP_FROM_80), ((2, 0.7), (4, 0.65), (8, 0.6)), 15 / 50),
    ("wan2.1_1.3b", "official_topk", "topk", 128, 32, (1, 2, 4, 8),
     ((0, 0.05), (0.05, 0.1), (0.1, 0.15), (0.15, 0.25), (0.25, 1)), None, 15 / 50),
    ("wan2.2_a14b", "official_balanced", "threshold", 128, 32, (1, 2, 8),
     ((0, 0.5), (0.5, 0.6), (0.6, 0.8), (0.8, 1)), None, 12 / 40),
    ("wan2.2_5b", "official_balanced", "threshold", 128, 32, (1, 2, 8),
     ((0, 0.6), (0.6, 0.7), *SKIP_FROM_80), None, 15 / 50),
]  # fmt: skip


@pytest.mark.parametrize("row", OFFICIAL, ids=lambda row: f"{row[0]} {row[1]}")
def test_an_official_preset_has_the_official_numbers(row: tuple[Any, ...]) -> None:
    family, name, selection, query_block, key_block, levels, ranges, caps, dense = row
    preset = load_presets(ROOT / "presets" / f"{family}.yaml")[name]
    assert preset.config == PSAConfig(
        selection=selection,
        levels=(*levels, "skip"),
        ranges=ranges,
        similarity_caps=caps,
        variance_term=False,
        order="gilbert",
        query_block=query_block,
        key_block=key_block,
    )
    assert preset.schedule == Schedule(start_percent=dense)


def test_every_family_has_its_presets() -> None:
    assert {path.stem for path in BUNDLED} == {family.preset_family for family in (*FAMILIES, *cogvideox.FAMILIES)}


def test_what_a_preset_leaves_out_takes_the_default() -> None:
    preset = parse("error_weight: 1e-3")
    assert preset.config == PSAConfig(error_weight=0.001)
    assert preset.schedule == Schedule()
    assert (preset.description, preset.source) == ("", "a test")


def test_everything_that_a_preset_can_say() -> None:
    preset = parse(
        "description: d, source: s, selection: threshold, levels: {1: [0, 0.4], 8: [0.4, 0.7], skip: [0.7, 1]}, "
        "similarity_caps: {8: 0.6}, variance_term: false, order: tile, tile: [2, 8, 8], query_block: 64, "
        "key_block: 32, importance_stride: 1, "
        'schedule: {start_percent: 0.25, end_percent: 0.9, dense_blocks: "0, -1", min_tokens: 5000}'
    )
    assert preset == Preset(
        name="mine",
        family="wan2.1_14b",
        description="d",
        source="s",
        config=PSAConfig(
            selection="threshold",
            levels=(1, 8, "skip"),
            ranges=((0, 0.4), (0.4, 0.7), (0.7, 1)),
            similarity_caps=((8, 0.6),),
            variance_term=False,
            order="tile",
            tile=(2, 8, 8),
            query_block=64,
            key_block=32,
            importance_stride=1,
        ),
        schedule=Schedule(0.25, 0.9, BlockList.parse("0, -1"), 5000),
    )
    assert parse_presets(dump_preset(preset), "again.yaml") == {"mine": preset}


def test_what_a_preset_can_say_of_the_error_weight() -> None:
    preset = parse(
        "error_weight: 0.003, group_keys: true, expected_work: 0.25, "
        'schedule: {ramp: 1, block_weights: {"0, 3-5": 0.3, -1: 2, "vace: 0": 0}}'
    )
    assert preset.config == PSAConfig(error_weight=0.003, group_keys=True)
    assert preset.schedule == Schedule(ramp=1, block_weights=WEIGHTS)
    assert preset.expected_work == 0.25
    assert parse_presets(dump_preset(preset), "again.yaml") == {"mine": preset}


OLD_FILE = """family: wan2.1_14b
presets:
  mine:
    description: ''
    source: changed from wan2.1_14b balanced
    selection: error
    levels: [1, 2, 4, 8, block]
    error_weight: 0.002
    variance_term: true
    order: gilbert
    query_block: 128
    key_block: 64
    importance_stride: 4
    schedule: {start_percent: 0.2, end_percent: 1.0, dense_blocks: '', min_tokens: 8192}
"""


def test_a_file_that_the_first_version_wrote_means_what_it_meant() -> None:
    preset = parse_presets(OLD_FILE, "old.yaml")["mine"]
    assert preset.config == PSAConfig(error_weight=0.002) and not preset.config.group_keys
    assert preset.schedule == Schedule(start_percent=0.2, min_tokens=8192) and not preset.schedule.varies
    assert preset.expected_work is None


def test_a_lone_block_needs_no_quotes() -> None:
    assert parse("error_weight: 0, schedule: {dense_blocks: -1}").schedule.dense_blocks == BlockList.parse("-1")


@pytest.mark.parametrize("path", BUNDLED, ids=lambda path: path.stem)
def test_a_dumped_preset_is_the_same_preset(path: Path) -> None:
    for name, preset in load_presets(path).items():
        assert parse_presets(dump_preset(preset), "again.yaml") == {name: preset}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ("error_wait: 1", "settings: unknown key 'error_wait'; allowed are description, source, selection, levels"),
        ("workspace_mib: 512, error_weight: 0", "settings: unknown key 'workspace_mib'"),
        ("error_weight: 0, schedule: {start: 0}", "schedule: unknown key 'start'; allowed are start_percent"),
        ("error_weight: 0, schedule: 3", "schedule: 3 is not a mapping of start_percent"),
        ("", "error_weight: None is not a number"),
        ("error_weight:", "error_weight: has no value; give one or leave the key out"),
        ("error_weight: much", "error_weight: 'much' is not a number from 0"),
        ("error_weight: .nan", "error_weight: nan is not a number from 0"),
        ("error_weight: -1", "error_weight: -1 is not a number from 0"),
        ("error_weight: 1, levels: [1, 3]", "levels: 3 is not one of 1, 2, 4, 8, 'block', 'skip'"),
        ("error_weight: 1, levels: [2, 1]", "are not listed once each from fine to coarse"),
        ("error_weight: 1, levels: 4", "levels: 4 is not a non-empty tuple"),
        ("error_weight: 1, levels: {1: [0, 1]}", "selection 'error' takes a list such as [1, 2, 4, 8, block]"),
        (
            "selection: topk, levels: [1, skip]",
            "selection 'topk' takes a mapping such as {1: [0, 0.4], skip: [0.4, 1]}",
        ),
        ("selection: topk", "selection 'topk' takes a mapping such as"),
        ("selection: topk, levels: {1: [0, 0.5], skip: [0.4, 1]}", "ranges: level 'skip' has [0.4, 1)"),
        ("selection: topk, levels: {1: [0, 0.5], skip: [0.5, 0.9]}", "ranges: the last one ends at 0.9, not at 1"),
        ("selection: topk, levels: {1: [0.5, 0], skip: [0, 1]}", "ranges: level 1 has [0.5, 0)"),
        ("selection: topk, levels: {1: half, skip: [0.5, 1]}", "ranges: 'half' of level 1 is not a pair of numbers"),
        (
            "selection: topk, levels: {1: [0, 0.5], 2: [0.5, 1]}, similarity_caps: 0.7",
            "similarity_caps: 0.7 is not one (level, least similarity) for each of the pooled levels (2,)",
        ),
        ("error_weight: 1, similarity_caps: {2: 0.7}", "have no meaning with selection 'error'"),
        ("selection: magic, error_weight: 1", "selection: 'magic' is not one of error, topk, threshold"),
        ("selection: [topk], error_weight: 1", "selection: ['topk'] is not one of"),
        ("error_weight: 1, order: spiral", "order: 'spiral' is not one of gilbert, tile, raster"),
        ("error_weight: 1, order: tile, tile: [4, 4]", "tile: (4, 4) is not three whole numbers"),
        ("error_weight: 1, query_block: 100", "query_block: 100 is not one of 64, 128"),
        ("error_weight: 1, variance_term: maybe", "variance_term: 'maybe' is not true or false"),
        ("error_weight: 1, description: 3", "description: 3 is not text"),
        ("error_weight: 1, schedule: {start_percent: 2}", "start_percent: 2 is not a number from 0 to 1"),
        ("error_weight: 1, schedule: {dense_blocks: 3-}", "dense_blocks: '3-' in '3-' is neither a block"),
        ("error_weight: 1, schedule: {dense_blocks: [0, 1]}", "dense_blocks: [0, 1] is not text"),
        ("error_weight: 1, schedule: {min_tokens: 8e3}", "min_tokens: 8000.0 is not a whole number"),
        ("error_weight: 1, group_keys: 1", "group_keys: 1 is not true or false"),
        ("error_weight: 1, schedule: {ramp: -1}", "ramp: -1 is not a number from 0 (one weight throughout) to 4"),
        (
            "error_weight: 1, schedule: {block_weights: 0.3}",
            "block_weights: 0.3 is not a mapping of blocks to factors such as {'0, 3-5': ",
        ),
        ("error_weight: 1, schedule: {block_weights: {x: 1}}", "block_weights: 'x' in 'x' is neither a block"),
        (
            "error_weight: 1, schedule: {block_weights: {0: much}}",
            "block_weights: 'much' of '0' is not a number from 0",
        ),
        (f"{RANKED}, schedule: {{ramp: 1}}", "ramp: 1 has no meaning with selection 'topk', only with 'error'"),
        (
            f"{RANKED}, schedule: {{block_weights: {{0: 0.3}}}}",
            "block_weights: {'0': 0.3} has no meaning with selection 'topk', only with 'error'",
        ),
        (
            "error_weight: 1, expected_work: 2",
            "expected_work: 2 is not a share of the dense work, above 0 and at most 1",
        ),
        ("error_weight: 1, expected_work:", "expected_work: has no value; give one or leave the key out"),
    ],
)
def test_a_wrong_setting_is_refused_with_file_preset_and_what_is_allowed(settings: str, message: str) -> None:
    with pytest.raises(PresetError) as error:
        parse(settings)
    assert str(error.value).startswith("mine.yaml: preset 'mine': ")
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "file: None is not a mapping of family, description, source, presets"),
        ("- 1", "file: [1] is not a mapping"),
        ("name: x", "file: unknown key 'name'"),
        ("presets: {a: {error_weight: 1}}", "family: None is not a name"),
        ("family: a/b\npresets: {a: {error_weight: 1}}", "family: 'a/b' is not a name"),
        ("family: wan", "presets: None is not a mapping of at least one name"),
        ("family: wan\npresets: {}", "presets: {} is not a mapping of at least one name"),
        ("family: wan\npresets: {false: {error_weight: 1}}", "preset name: False is not a name"),
        ("family: wan\npresets: {a: 1}", "preset 'a': settings: 1 is not a mapping"),
        ("family: wan\nfamily: wan", "line 2: key 'family' is given twice"),
        ("family: wan\npresets:\n  a: {error_weight: 1, error_weight: 2}", "line 3: key 'error_weight' is given twice"),
        ("family: &name wan\npresets: {}", "line 1: anchors (&) and aliases (*) are not allowed"),
        ("family: *name", "line 1: anchors (&) and aliases (*) are not allowed"),
        ("a: &a [x, x]\nb: &b [*a, *a]\nc: [*b, *b]", "line 1: anchors (&) and aliases (*) are not allowed"),
        ("family: wan\npresets: {a: {<<: {error_weight: 1}}}", "settings: unknown key '<<'"),
        ("family: !!python/object/apply:os.getcwd []", "tags (tag:yaml.org,2002:python/object/apply:os"),
        ("family: !!int ''", "line 1: tags (tag:yaml.org,2002:int) are not allowed"),
        ('family: "\\UFFFFFFFF"', "is not readable YAML"),
        ("family: wan\npresets: {a: {error_weight: 0x" + "f" * 18 + "}}", "is not a number from 0 (dense) to 1e6"),
        *(
            (
                f"family: wan\npresets: {{a: {{{key}: 0x{'f' * 4000}}}}}",
                "fff is longer than a whole number of 20 characters",
            )
            for key in ("error_weight", "key_block", "schedule")
        ),
        (
            "family: wan\npresets: {a: {error_weight: 1, schedule: {min_tokens: 2147483648}}}",
            "min_tokens: 2147483648 is not a whole number of tokens from 0 to 2147483647",
        ),
        ("family: [", "line 1: "),
        ("a: 1\n---\nb: 2", "line 2: "),
        ("? [1, 2]\n: 3", "line 1: [1, 2] cannot be a key"),
        ("a: 2024-99-99", "file: unknown key 'a'"),
        ("a: \x00", "is not readable YAML"),
        ("a: " + "1" * 5000, "111 is longer than a whole number of 20 characters"),
        ("[" * 20000, "is not readable YAML"),
    ],
)
def test_what_is_no_preset_file_is_refused(text: str, message: str) -> None:
    with pytest.raises(PresetError) as error:
        parse_presets(text, "odd.yaml")
    assert str(error.value).startswith("odd.yaml: ")
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("written", "value"),
    [
        ("0", 0), ("-0", 0), ("+7", 7), ("010", 10), ("0o10", 8), ("0x1F", 31), ("1e-3", 0.001), ("1E+2", 100.0),
        (".5", 0.5), ("5.", 5.0), ("1_0", None), ("0b11", None), ("1:30", None), ("1:30.5", None), ("on", None),
        ("true", None), ("~", None), ("2024-01-01", None), (".inf", None), ("-.INF", None), (".NaN", None), ("=", None),
        ("0x", None), ("0o8", None), ("1e7", None), ("1e999", None), ("\u0661", None), ("'1'", None), ("1 000", None),
        ("1,5", None), ("9" * 21, None),
    ],
)  # fmt: skip
def test_a_number_means_what_it_means_to_people(written: str, value: float | None) -> None:
    """YAML 1.1 takes 1:30 for ninety, 010 for eight, on for true, 1_0 for ten and 2024-01-01 for a date."""
    if value is not None:
        weight = parse(f"error_weight: {written}").config.error_weight
        assert weight == value and type(weight) is type(value)
    else:
        with pytest.raises(PresetError, match=r"mine\.yaml: "):
            parse(f"error_weight: {written}")


@pytest.mark.parametrize("written", ["no", "off", "n", "No", "OFF", "0", "'false'", "~"])
def test_only_false_is_false(written: str) -> None:
    assert parse("error_weight: 1, variance_term: false").config.variance_term is False
    with pytest.raises(PresetError, match="variance_term: "):
        parse(f"error_weight: 1, variance_term: {written}")


WORDS = ["off", "no", "1e5", "0o17", "0x1F", "010", "1:30", "2024-01-01", "1_0", "null", "~", "true", ".nan", "=", "<<"]


@given(st.one_of(st.sampled_from(WORDS), st.text(st.characters(exclude_categories=["Cs", "Cc"]), max_size=80)))
def test_any_text_survives_being_written(text: str) -> None:
    preset = dataclasses.replace(parse("error_weight: 1"), description=text, source=text)
    written = dump_preset(preset)
    assert parse_presets(written, "again.yaml") == {"mine": preset}
    assert yaml.safe_load(written)["presets"]["mine"]["description"] == text  # YAML 1.1


@pytest.mark.parametrize("name", [word for word in WORDS if re.fullmatch(r"[\w.-]+", word)])
def test_any_name_survives_being_written(name: str) -> None:
    preset = dataclasses.replace(parse("error_weight: 1"), name=name, family=name)
    assert parse_presets(dump_preset(preset), "again.yaml") == {name: preset}


def test_only_what_is_given_changes() -> None:
    base = parse("error_weight: 1, key_block: 32, schedule: {min_tokens: 5, dense_blocks: '0, -1'}")
    base = dataclasses.replace(base, config=dataclasses.replace(base.config, workspace_mib=64))
    assert change(base, {}, {}) == base
    made = change(base, {"error_weight": 2, "levels": [1, "block"]}, {"end_percent": 0.5}, name="new")
    assert made == Preset(
        "new",
        base.family,
        base.description,
        "changed from wan2.1_14b mine",
        dataclasses.replace(base.config, error_weight=2, levels=(1, "block")),
        dataclasses.replace(base.schedule, end_percent=0.5),
    )
    blocks = BlockList.parse("3")
    assert change(base, {}, {"dense_blocks": blocks}, source="s").schedule.dense_blocks == blocks
    assert change(base, {}, {}, source="s").source == "s"


def test_another_selection_drops_the_weights_of_steps_and_blocks() -> None:
    base = parse("error_weight: 1, schedule: {ramp: 1, block_weights: {0: 0.3}, min_tokens: 5}, expected_work: 0.2")
    made = change(base, {"selection": "topk", "levels": {1: [0, 0.5], "skip": [0.5, 1]}}, {})
    assert made.schedule == Schedule(min_tokens=5)
    with pytest.raises(PresetError, match=r"^ramp: 1 has no meaning with selection 'topk'"):
        change(base, {"selection": "topk", "levels": {1: [0, 0.5], "skip": [0.5, 1]}}, {"ramp": 1})
    kept = change(base, {"error_weight": 2}, {"block_weights": WEIGHTS})
    assert kept.schedule == Schedule(ramp=1, block_weights=WEIGHTS, min_tokens=5)


def test_of_a_changed_preset_no_work_is_expected() -> None:
    base = parse("error_weight: 1, expected_work: 0.2")
    assert change(base, {}, {}, name="copy").expected_work == 0.2
    assert change(base, {"error_weight": 1}, {"ramp": 0}).expected_work == 0.2
    for settings, schedule in (({"error_weight": 2}, {}), ({}, {"start_percent": 0.1}), ({"group_keys": True}, {})):
        assert change(base, settings, schedule).expected_work is None


@pytest.mark.parametrize("path", BUNDLED, ids=lambda path: path.stem)
def test_a_preset_without_changes_is_the_same(path: Path) -> None:
    for preset in load_presets(path).values():
        assert change(preset, {}, {}) == preset


@pytest.mark.parametrize(
    ("settings", "schedule", "name", "message"),
    [
        ({"error_wait": 1}, {}, None, "settings: unknown key 'error_wait'; allowed are selection, levels"),
        ({"description": "d"}, {}, None, "settings: unknown key 'description'"),
        ({"workspace_mib": 1}, {}, None, "settings: unknown key 'workspace_mib'"),
        ({"error_weight": None}, {}, None, "error_weight: has no value; give one or leave the key out"),
        ({}, {"start": 0}, None, "schedule: unknown key 'start'; allowed are start_percent"),
        ({}, {"dense_blocks": "x"}, None, "dense_blocks: 'x' in 'x' is neither a block"),
        ({}, {}, "a/b", "name: 'a/b' is not a name of 1 to 64 letters"),
        ({"levels": "x" * 9000}, {}, None, "xxx' is not a non-empty tuple of 1, 2, 4, 8, 'block', 'skip'"),
    ],
)
def test_a_change_that_cannot_be_is_refused(
    settings: dict[str, Any], schedule: dict[str, Any], name: str | None, message: str
) -> None:
    with pytest.raises(PresetError) as error:
        change(parse("error_weight: 1"), settings, schedule, name=name)
    assert message in str(error.value)
    assert len(str(error.value)) < 620


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(PresetError, match=r"gone\.yaml: cannot be read \(No such file or directory\)"):
        load_presets(tmp_path / "gone.yaml")


def test_a_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "folder.yaml").mkdir()
    with pytest.raises(PresetError, match=r"folder\.yaml: cannot be read"):
        load_presets(tmp_path / "folder.yaml")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="there are no named pipes on Windows")
def test_what_would_never_end_is_refused_at_once(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.yaml")
    (tmp_path / "zero.yaml").symlink_to("/dev/zero")
    for name in ("pipe", "zero"):
        with pytest.raises(PresetError, match=rf"{name}\.yaml: cannot be read \(it is no regular file\)"):
            load_presets(tmp_path / f"{name}.yaml")


def test_a_file_that_is_not_utf8_is_refused(tmp_path: Path) -> None:
    (tmp_path / "latin.yaml").write_bytes(b"family: wan\xe9")
    with pytest.raises(PresetError, match=r"latin\.yaml: is not UTF-8 text \(.* at byte 11\)"):
        load_presets(tmp_path / "latin.yaml")


def test_a_file_may_be_as_long_as_allowed_and_no_longer(tmp_path: Path) -> None:
    text = preset_text("error_weight: 1")
    path = tmp_path / "long.yaml"
    path.write_text(text + "#" * (MAX_FILE_BYTES - len(text)))
    assert list(load_presets(path)) == ["mine"]
    path.write_text(text + "#" * (MAX_FILE_BYTES - len(text) + 1))
    with pytest.raises(PresetError, match=r"long\.yaml: is longer than the allowed 32768 bytes"):
        load_presets(path)


def test_a_byte_order_mark_is_no_error(tmp_path: Path) -> None:
    (tmp_path / "bom.yaml").write_text(preset_text("error_weight: 1"), encoding="utf-8-sig")
    assert list(load_presets(tmp_path / "bom.yaml")) == ["mine"]


@pytest.mark.parametrize("family", [family for family in FAMILIES if family.preset_family != "wan2.2_a14b"])
def test_a_released_size_is_its_own_family(family) -> None:
    assert detect_family(family.dim, family.blocks, family.out_channels).family is family


def test_a14b_is_taken_for_14b_with_both_named() -> None:
    assert detect_family(5120, 40, 16) == Detected(WAN21_14B, others=(WAN22_A14B,))
    assert detect_family(1536, 30, 16) == Detected(WAN21_1_3B)


def test_an_unknown_size_goes_to_the_nearest_width() -> None:
    assert detect_family(256, 2, 16) == Detected(WAN21_1_3B, is_released=False)
