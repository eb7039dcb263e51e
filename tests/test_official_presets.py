"""Files in the form of the official attention_config.yaml."""

from __future__ import annotations

import logging

import pytest
import yaml
from psa_pack.psa_core.config import PSAConfig
from psa_pack.psa_core.presets import Preset, PresetError, dump_preset, parse_presets
from psa_pack.psa_core.schedule import Schedule

FILE = """
Wan2.2_A14B:
  default_attention: mine
  video_scale: {width_divisor: 16, height_divisor: 16, depth_divisor: 4}
  text_length: 0
  attention_configs:
    plain: {type: dense, description: nothing}
    mine:
      type: psa
      description: my own
      use_rearrange: true
      use_sim_mask: true
      block_size: {m: 128, n: 64, tile_n: 32}
      mask_ratios: {1: [0.0, 0.3], 2: [0.3, 0.5], 4: [0.5, 0.5], 8: [0.5, 0.75], 0: [0.75, 1.0]}
      mask_mode: thresholdbound
      attn_impl: old_mask_type
      tile_size: [2, 8, 8]
      warmup_steps: 10
      rearrange_method: Gilbert
      verbose: true
      sim_thresholds: {x2: 0.8, x4: 0.7, x8: 0.6}
Some_Model:
  attention_configs:
    tiled:
      type: psa
      use_rearrange: true
      rearrange_method: STA
      tile_size: [2, 8, 8]
      block_size: {m: 64, n: 32}
      mask_ratios: {1: [0, 0.1], 0: [0.1, 1]}
      mask_mode: topk
      warmup_steps: 5
    unordered:
      type: psa
      use_rearrange: false
      rearrange_method: Gilbert
      block_size: {m: 128, n: 128}
      mask_ratios: {0: [0.1, 1], 1: [0, 0.1]}
      mask_mode: topk
      warmup_steps: 0
"""


def parse(text: str = FILE) -> dict[str, Preset]:
    return parse_presets(text, "theirs.yaml")


def changed(**settings: object) -> str:
    """The file with settings of its preset ``mine`` changed, or taken out where the value is ``...``."""
    document = yaml.safe_load(FILE)
    preset = document["Wan2.2_A14B"]["attention_configs"]["mine"]
    for key, value in settings.items():
        if value is ...:
            del preset[key]
        else:
            preset[key] = value
    return yaml.safe_dump(document)


def test_official_words_become_ours() -> None:
    presets = parse()
    assert list(presets) == ["Wan2.2_A14B.mine", "Some_Model.tiled", "Some_Model.unordered"]
    mine = presets["Wan2.2_A14B.mine"]
    assert (mine.name, mine.family, mine.description) == ("mine", "Wan2.2_A14B", "my own")
    assert mine.config == PSAConfig(
        selection="threshold",
        levels=(1, 2, 8, "skip"),
        ranges=((0, 0.3), (0.3, 0.5), (0.5, 0.75), (0.75, 1)),
        similarity_caps=((2, 0.8), (8, 0.6)),
        variance_term=False,
        order="gilbert",
        query_block=128,
        key_block=64,
    )
    assert mine.schedule == Schedule(start_percent=10 / 40)  # of A14B's 40 official steps


def test_orders_and_warm_up_of_other_models() -> None:
    presets = parse()
    tiled, unordered = presets["Some_Model.tiled"], presets["Some_Model.unordered"]
    assert (tiled.config.order, tiled.config.tile, tiled.config.levels) == ("tile", (2, 8, 8), (1, "skip"))
    assert (tiled.config.selection, tiled.schedule.start_percent) == ("topk", 0.1)
    assert (unordered.config.order, unordered.config.levels) == ("raster", (1, "skip"))
    assert unordered.schedule == Schedule()


def test_a_translated_preset_can_be_written_as_one_of_ours() -> None:
    for preset in parse().values():
        assert parse_presets(dump_preset(preset), "again.yaml") == {preset.name: preset}


def test_what_has_no_meaning_here_is_named_in_one_warning(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        parse()
    (message,) = (entry.getMessage() for entry in caplog.records)
    assert message.startswith("PSA: theirs.yaml: left out, because it has no meaning here: ")
    for key in ("default_attention", "video_scale", "text_length", "attn_impl", "verbose", "tile_n", "type dense"):
        assert message.count(key) == 1
    assert "tile_size without rearrange_method STA" in message
    assert "rearrange_method without use_rearrange" in message
    assert "sim_thresholds" not in message


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (changed(speed=3), "Wan2.2_A14B: preset 'mine': settings: unknown key 'speed'; allowed are type, description"),
        (FILE.replace("text_length", "text_size"), "Wan2.2_A14B: model: unknown key 'text_size'"),
        (FILE.replace("depth_divisor", "depth"), "Wan2.2_A14B: video_scale: unknown key 'depth'"),
        (changed(type="sparse"), "type: 'sparse' is not one of psa, dense"),
        (changed(mask_mode="best"), "mask_mode: 'best' is not one of topk, thresholdbound"),
        (changed(rearrange_method="Hybrid"), "rearrange_method: 'Hybrid' is not one of Gilbert, STA"),
        (changed(rearrange_method=...), "rearrange_method: None is not one of Gilbert, STA"),
        (changed(block_size={"m": 128, "k": 1}), "block_size: unknown key 'k'; allowed are m, n, tile_n"),
        (changed(block_size={"m": 100, "n": 64}), "query_block: 100 is not one of 64, 128"),
        (changed(block_size=...), "block_size: is missing"),
        (changed(mask_ratios={1: [0, 1], 16: [1, 1]}), "mask_ratios: unknown key 16; allowed are 1, 2, 4, 8, 0"),
        (changed(mask_ratios={1: [0, 0.5], 0: [0.6, 1]}), "ranges: level 'skip' has [0.6, 1)"),
        (changed(mask_ratios=3), "mask_ratios: 3 is not a mapping"),
        (changed(warmup_steps=40), "warmup_steps: 40 is not a whole number from 0 to 39"),
        (changed(use_sim_mask="yes"), "use_sim_mask: 'yes' is not true or false"),
        (changed(sim_thresholds=...), "sim_thresholds: None is not a mapping"),
        (changed(sim_thresholds={"x2": 0.5}), "similarity_caps: None of level 8 is not a cosine from -1 to 1"),
        ("a/b: {attention_configs: {}}", "attention_configs: there is no preset of type psa"),
        ("a: {attention_configs: 3}", "a: attention_configs: 3 is not a mapping"),
        ("a: {attention_configs: {b: 3}}", "a: preset 'b': settings: 3 is not a mapping"),
        (FILE + "family: wan", "family: model: 'wan' is not a mapping"),
        (FILE.replace("Some_Model", "Some/Model"), "Some/Model: preset 'tiled': model: 'Some/Model' is not a name"),
    ],
)
def test_what_is_wrong_is_refused(text: str, message: str) -> None:
    with pytest.raises(PresetError) as error:
        parse(text)
    assert str(error.value).startswith("theirs.yaml: ")
    assert message in str(error.value)
