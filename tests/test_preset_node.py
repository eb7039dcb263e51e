"""PSA Preset: what it makes of a base, what it refuses, and what it writes."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import Any

import psa_pack  # noqa: F401  (named, so that a run of this file alone loads the pack)
import pytest
from psa_pack.psa_core.presets import Preset, PresetError, load_presets, parse_presets
from psa_pack.psa_core.schedule import BlockList, BlockWeights, Schedule

TOPK = "family: wan\npresets: {ranked: {selection: topk, levels: {1: [0, 0.2], 8: [0.2, 1]}, order: raster}}"
TILED = "family: wan\npresets: {tiled: {error_weight: 0.1, order: tile, tile: [2, 4, 4]}}"


@pytest.fixture
def node(comfyui: Path, user_folder: Path) -> Any:
    """The node, with an empty user folder."""
    from psa_pack.nodes.preset import PSAPreset

    return PSAPreset


@pytest.fixture
def base(comfyui: Path) -> Preset:
    from psa_pack.nodes.preset_loader import load_preset

    return load_preset("wan2.1_14b/balanced")


def make(node: Any, name: str = "mine", **values: Any) -> Preset:
    preset: Preset = node.execute(name, **values).args[0]
    return preset


def base_of(text: str) -> Preset:
    (preset,) = parse_presets(text, "test").values()
    return preset


def test_only_the_name_changes_where_nothing_is_given(node: Any, base: Preset) -> None:
    made = make(node, base=base)
    assert (made.name, made.family, made.source) == ("mine", base.family, base.source)
    assert (made.config, made.schedule) == (base.config, base.schedule)


def test_what_is_given_replaces_the_bases(node: Any, base: Preset) -> None:
    made = make(
        node,
        base=base,
        error_weight=0.25,
        levels="[1, 4, block]",
        start_percent=0.0,
        end_percent=0.9,
        dense_blocks="0, -1",
        min_tokens=0,
        order="raster",
    )
    assert made.config.error_weight == 0.25
    assert made.config.levels == (1, 4, "block")
    assert made.config.order == "raster"
    assert made.config.key_block == base.config.key_block
    assert (made.schedule.start_percent, made.schedule.end_percent, made.schedule.min_tokens) == (0.0, 0.9, 0)
    assert made.schedule.dense_blocks == BlockList.parse("0, -1")
    assert made.source == f"changed from {base.family} {base.name}"


def test_the_ramp_and_the_order_of_keys_can_be_given(node: Any, base: Preset) -> None:
    flat = make(node, base=base, ramp=0.0, group_keys="off")
    assert (flat.schedule.ramp, flat.config.group_keys) == (0.0, False)
    steep = make(node, base=flat, ramp=2.0, group_keys="on")
    assert (steep.schedule.ramp, steep.config.group_keys) == (2.0, True)
    weighted = dataclasses.replace(steep, schedule=Schedule(ramp=1, block_weights=BlockWeights.parse({"0": 0.3})))
    assert make(node, base=weighted, error_weight=0.01).schedule == weighted.schedule


def test_new_inputs_come_last_so_that_saved_workflows_keep_their_values(node: Any) -> None:
    names = [entry.id for entry in node.GET_SCHEMA().inputs]
    assert names[-4:] == ["save", "overwrite", "ramp", "group_keys"]


def test_without_a_base_the_rest_is_a_bundled_presets(node: Any, base: Preset) -> None:
    made = make(node, error_weight=0.02, min_tokens=7)
    assert made.config == dataclasses.replace(base.config, error_weight=0.02)
    assert made.schedule == dataclasses.replace(base.schedule, min_tokens=7)
    assert (made.name, made.family) == ("mine", "own")
    assert make(node, selection="topk", levels="{1: [0, 1]}").config.ranges == ((0, 1),)


def test_the_node_runs_as_it_is_placed(node: Any, base: Preset) -> None:
    schema = node.GET_SCHEMA()
    preset, text = node.execute(**{entry.id: entry.default for entry in schema.inputs if entry.id != "base"}).args
    assert (preset.name, preset.family, preset.source) == ("mine", "own", "made in the graph")
    assert (preset.config, preset.schedule) == (base.config, base.schedule)
    assert parse_presets(text, "text") == {"mine": preset}


def test_another_selection_drops_what_belonged_to_the_old_one(node: Any, base: Preset) -> None:
    ranked = make(node, base=base, selection="topk", levels="{1: [0, 0.4], skip: [0.4, 1]}")
    assert ranked.config.ranges == ((0, 0.4), (0.4, 1))
    assert ranked.config.error_weight is None
    again = make(node, base=ranked, selection="error", error_weight=0.5)
    assert (again.config.selection, again.config.ranges, again.config.error_weight) == ("error", None, 0.5)


def test_another_order_drops_the_tile(node: Any) -> None:
    assert make(node, base=base_of(TILED)).config.tile == (2, 4, 4)
    assert make(node, base=base_of(TILED), order="gilbert").config.tile is None


def test_the_text_is_a_preset_file(node: Any, base: Preset) -> None:
    preset, text = node.execute("mine", base=base, error_weight=0.25).args
    assert parse_presets(text, "text") == {"mine": preset}


@pytest.mark.parametrize(
    ("base", "values", "message"),
    [
        (TOPK, {"error_weight": 0.1}, "error_weight: 0.1 has no meaning with selection 'topk'"),
        (TOPK, {"ramp": 1.0}, "ramp: 1.0 has no meaning with selection 'topk', only with 'error'"),
        (TOPK, {"ramp": 5.0}, "ramp: 5.0 is not a number from 0 (one weight throughout) to 4"),
        (TOPK, {"group_keys": "yes"}, "group_keys: 'yes' is not one of as base, on, off"),
        (TOPK, {"group_keys": [1]}, "group_keys: [1] is not one of as base, on, off"),
        (TOPK, {"levels": "[1, 8]"}, "levels: [1, 8] gives no ranges; selection 'topk' takes a mapping such as"),
        (TOPK, {"levels": "{1: [0, 0.2], 8: [0.3, 1]}"}, "level 8 has [0.3, 1); ranges ascend without gap"),
        (TOPK, {"selection": "error"}, "error_weight: None is not a number from 0 (dense) to 1e6"),
        (TILED, {"levels": "{1: [0, 1]}"}, "gives ranges; selection 'error' takes a list"),
        (TILED, {"levels": "[1, 3]"}, "levels: 3 is not one of 1, 2, 4, 8, 'block', 'skip'"),
        (TILED, {"levels": "[1, 2"}, "levels: '[1, 2' is neither a list such as [1, 2, 4, 8, block] nor ranges"),
        (TILED, {"start_percent": 0.9, "end_percent": 0.5}, "start_percent: 0.9 is not below end_percent, 0.5"),
        (TILED, {"start_percent": -0.5}, "start_percent: -0.5 is not a number from 0 to 1"),
        (TILED, {"dense_blocks": "first"}, "dense_blocks: 'first' in 'first' is neither a block"),
        (TILED, {"min_tokens": -5}, "min_tokens: -5 is not a whole number of tokens"),
    ],
)
def test_what_does_not_fit_is_refused(node: Any, base: str, values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError) as refused:
        make(node, base=base_of(base), **values)
    assert message in str(refused.value)


@pytest.mark.parametrize("name", ["", "a/b", "a\\b", "../mine", "n" * 65, "two words", "mine\n"])
def test_a_name_that_is_none_is_refused_and_nothing_is_written(node: Any, user_folder: Path, name: str) -> None:
    with pytest.raises(PresetError) as refused:
        make(node, name, error_weight=0.1, save=True)
    assert f"{name!r} is not a name of 1 to 64 letters, digits, '.', '_' or '-'" in str(refused.value)
    assert list(user_folder.iterdir()) == []


def test_a_saved_preset_is_found_by_the_loader(node: Any, base: Preset, user_folder: Path) -> None:
    from psa_pack.nodes.preset_loader import PSAPresetLoader

    made = make(node, "n" * 64, base=base, error_weight=0.25, save=True)
    assert [path.name for path in (user_folder / "psa_presets").iterdir()] == ["n" * 64 + ".yaml"]
    choice = f"user/{made.name}/{made.name}"
    assert choice in PSAPresetLoader.INPUT_TYPES()["required"]["preset"][1]["options"]
    assert PSAPresetLoader.execute(choice).args[0] == made


def test_nothing_is_written_unless_asked(node: Any, user_folder: Path) -> None:
    make(node, error_weight=0.1)
    assert list(user_folder.iterdir()) == []


def test_a_file_that_differs_stays_unless_it_may_be_replaced(node: Any, user_folder: Path) -> None:
    path = user_folder / "psa_presets/mine.yaml"
    make(node, error_weight=0.1, save=True)
    before = path.read_bytes()
    make(node, error_weight=0.1, save=True)  # the same again is no conflict
    with pytest.raises(ValueError) as refused:
        make(node, error_weight=0.2, save=True)
    assert str(refused.value) == "name: psa_presets/mine.yaml is there already; take another name or set overwrite"
    assert path.read_bytes() == before
    make(node, error_weight=0.2, save=True, overwrite=True)
    assert b"error_weight: 0.2" in path.read_bytes()


def test_a_folder_that_cannot_be_written_is_named(node: Any, user_folder: Path) -> None:
    (user_folder / "psa_presets").write_text("a file, where the folder should be")
    with pytest.raises(ValueError) as refused:
        make(node, error_weight=0.1, save=True)
    assert str(refused.value).startswith("save: psa_presets/mine.yaml cannot be written (")


def test_a_write_that_fails_costs_nothing(node: Any, user_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make(node, error_weight=0.1, save=True)
    before = (user_folder / "psa_presets/mine.yaml").read_bytes()

    def full(self: Path, data: bytes) -> int:
        with self.open("wb") as file:
            file.write(data[:10])
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(ValueError) as refused:
        make(node, error_weight=0.2, save=True, overwrite=True)
    assert os.strerror(28) in str(refused.value)
    assert [path.name for path in (user_folder / "psa_presets").iterdir()] == ["mine.yaml"]
    assert (user_folder / "psa_presets/mine.yaml").read_bytes() == before


def refuse_what_is_there(node: Any, path: Path) -> None:
    with pytest.raises(ValueError) as refused:
        make(node, save=True)
    assert str(refused.value) == f"name: psa_presets/{path.name} is there already; take another name or set overwrite"


def replace_what_is_there(node: Any, path: Path) -> None:
    made = make(node, save=True, overwrite=True)
    assert path.is_file() and not path.is_symlink()
    assert load_presets(path) == {"mine": made}


@pytest.fixture
def place(user_folder: Path) -> Path:
    """Where the node saves a preset called mine."""
    (user_folder / "psa_presets").mkdir()
    return user_folder / "psa_presets/mine.yaml"


@pytest.mark.parametrize("held", [b"family: \xe9", b"\x80\x81", b"", b"#" * 40000], ids=lambda held: repr(held[:12]))
def test_a_file_that_is_no_preset_stays_unless_it_may_be_replaced(node: Any, place: Path, held: bytes) -> None:
    place.write_bytes(held)
    refuse_what_is_there(node, place)
    assert place.read_bytes() == held
    replace_what_is_there(node, place)


@pytest.mark.parametrize("target", ["nowhere.yaml", "mine.yaml", "."])
def test_a_link_stays_unless_it_may_be_replaced(node: Any, place: Path, target: str) -> None:
    try:
        place.symlink_to(target)  # to nothing, to itself, to a folder
    except OSError as error:
        pytest.skip(f"links cannot be made here: {error}")
    refuse_what_is_there(node, place)
    assert os.readlink(place) == target
    replace_what_is_there(node, place)
    assert [path.name for path in place.parent.iterdir()] == ["mine.yaml"]


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="there are no named pipes on Windows")
def test_a_pipe_stays_unless_it_may_be_replaced(node: Any, place: Path) -> None:
    os.mkfifo(place)
    refuse_what_is_there(node, place)
    assert place.is_fifo()
    replace_what_is_there(node, place)


def test_a_folder_in_the_files_place_is_named(node: Any, place: Path) -> None:
    place.mkdir()
    refuse_what_is_there(node, place)
    with pytest.raises(ValueError, match=r"save: psa_presets/mine\.yaml cannot be written \("):
        make(node, save=True, overwrite=True)


def test_a_file_with_the_other_ending_is_the_same_file(node: Any, place: Path) -> None:
    other = place.with_suffix(".yml")
    other.write_text(TILED)
    refuse_what_is_there(node, other)
    replace_what_is_there(node, other)
    assert not place.exists()


def test_what_could_not_be_read_again_is_not_saved(node: Any, place: Path, base: Preset) -> None:
    with pytest.raises(ValueError, match=r"save: psa_presets/mine\.yaml would be longer than the allowed 32768 bytes"):
        make(node, base=dataclasses.replace(base, description="\u97f3" * 11000), save=True)
    assert not place.exists()


def test_no_message_shows_where_the_user_folder_is(node: Any, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise PermissionError(13, os.strerror(13), str(place))

    monkeypatch.setattr(os, "replace", broken)
    with pytest.raises(ValueError) as refused:
        make(node, save=True)
    assert str(refused.value) == f"save: psa_presets/mine.yaml cannot be written ({os.strerror(13)})"
