"""What ComfyUI learns about the nodes, and the preset loader."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path
from typing import Any

import psa_pack
import pytest

OFFICIAL_PRESET = """
Wan2.1_14b:
  attention_configs:
    mine: {type: psa, use_rearrange: false, block_size: {m: 128, n: 64}, mask_ratios: {1: [0, 0.1], 0: [0.1, 1]},
           mask_mode: topk, warmup_steps: 15}
"""
USER_PRESET = "family: wan2.1_14b\npresets: {mine: {error_weight: 0.5}}\n"


@pytest.fixture(scope="session")
def nodes(comfyui: Path) -> dict[str, Any]:
    extension = asyncio.run(psa_pack.comfy_entrypoint())
    return {node.GET_SCHEMA().node_id: node for node in asyncio.run(extension.get_node_list())}


def inputs(node: Any) -> dict[str, tuple[str, dict[str, Any]]]:
    types = node.INPUT_TYPES()
    return types["required"] | types.get("optional", {})


def test_the_pack_declares_an_entrypoint_and_its_help_only() -> None:
    assert psa_pack.WEB_DIRECTORY == "./web"
    assert not hasattr(psa_pack, "NODE_CLASS_MAPPINGS")


def test_the_nodes_are_there_in_their_categories(nodes: dict[str, Any]) -> None:
    schemas = {name: node.GET_SCHEMA() for name, node in nodes.items()}
    assert {name: schema.category for name, schema in schemas.items()} == {
        "PSAAttentionPatch": "model/patch",
        "PSAPresetLoader": "model/patch",
        "PSAPreset": "model/patch",
        "PSAReport": "model/patch",
        "PSAQualityProbe": "sampling",
        "PSACompare": "image",
        "PSALoadCogVideoX": "model/loaders",
        "PSALoadCogVideoXLoRA": "model/loaders",
    }
    assert all(schema.description for schema in schemas.values())


def test_every_input_and_output_has_a_tooltip(nodes: dict[str, Any]) -> None:
    for node in nodes.values():
        for entry in (*node.GET_SCHEMA().inputs, *node.GET_SCHEMA().outputs):
            assert entry.tooltip, entry.id


def test_the_patch_shows_two_inputs_and_keeps_the_rest_for_experts(nodes: dict[str, Any]) -> None:
    entries = inputs(nodes["PSAAttentionPatch"])
    assert list(entries) == [
        "model",
        "preset",
        "custom_preset",
        "error_weight",
        "start_percent",
        "end_percent",
        "dense_blocks",
        "min_tokens",
        "backend",
        "verbose",
    ]
    assert [name for name, (_, options) in entries.items() if not options.get("advanced")] == [
        "model",
        "preset",
        "custom_preset",
    ]
    assert entries["preset"][1]["options"] == ["balanced", "quality", "fast", "off"]
    assert entries["custom_preset"][0] == "PSA_PRESET"


def test_the_probe_takes_what_ksampler_takes_and_its_own(nodes: dict[str, Any]) -> None:
    from nodes import KSampler, KSamplerAdvanced

    entries = inputs(nodes["PSAQualityProbe"])
    plain = KSampler.INPUT_TYPES()["required"]
    assert list(entries)[: len(plain)] == list(plain)
    for name, (kind, *options) in plain.items():
        ours = entries[name]
        assert ours[0] == (kind if isinstance(kind, str) else "COMBO") or ours[0] == kind
        assert not isinstance(kind, list) or ours[1]["options"] == kind
        for key in ("default", "min", "max", "step", "round") if options else ():
            assert ours[1].get(key) == options[0].get(key), (name, key)
    assert entries["seed"][1]["control_after_generate"] is True
    own = list(entries)[len(plain) :]
    advanced = [name for name, (_, options) in entries.items() if options.get("advanced")]
    assert own == ["share", "wanted_error", *advanced]
    assert set(advanced) <= KSamplerAdvanced.INPUT_TYPES()["required"].keys()
    assert nodes["PSAQualityProbe"].GET_SCHEMA().is_output_node


def test_the_loader_lists_every_bundled_preset(nodes: dict[str, Any]) -> None:
    families = ("cogvideox_5b", "cogvideox1.5_5b", "wan2.1_1.3b", "wan2.1_14b", "wan2.2_5b", "wan2.2_a14b")
    expected = {f"{family}/{name}" for family in families for name in ("balanced", "quality", "fast")}
    assert expected <= set(inputs(nodes["PSAPresetLoader"])["preset"][1]["options"])


def test_the_loader_loads_what_it_lists(nodes: dict[str, Any]) -> None:
    loader = nodes["PSAPresetLoader"]
    for choice in inputs(loader)["preset"][1]["options"]:
        assert loader.validate_inputs(choice) is True
        preset = loader.execute(choice).args[0]
        assert f"{preset.family}/{preset.name}" == choice


def test_the_users_own_presets_are_listed_and_loaded(nodes: dict[str, Any], user_folder: Path) -> None:
    (user_folder / "psa_presets").mkdir()
    (user_folder / "psa_presets" / "my wan.yaml").write_text(USER_PRESET)
    loader = nodes["PSAPresetLoader"]
    assert "user/my wan/mine" in inputs(loader)["preset"][1]["options"]
    assert loader.validate_inputs("user/my wan/mine") is True
    assert loader.execute("user/my wan/mine").args[0].config.error_weight == 0.5


def test_a_file_in_the_official_form_is_listed_and_loaded(nodes: dict[str, Any], user_folder: Path) -> None:
    (user_folder / "psa_presets").mkdir()
    (user_folder / "psa_presets" / "attention_config.yaml").write_text(OFFICIAL_PRESET)
    loader = nodes["PSAPresetLoader"]
    choice = "user/attention_config/Wan2.1_14b.mine"
    assert choice in inputs(loader)["preset"][1]["options"]
    assert loader.validate_inputs(choice) is True
    assert loader.execute(choice).args[0].config.ranges == ((0, 0.1), (0.1, 1))


def test_a_changed_file_gives_another_fingerprint(nodes: dict[str, Any], user_folder: Path) -> None:
    folder = user_folder / "psa_presets"
    folder.mkdir()
    loader = nodes["PSAPresetLoader"]
    missing = loader.fingerprint_inputs("user/own/mine")
    (folder / "own.yaml").write_text(USER_PRESET)
    first = loader.fingerprint_inputs("user/own/mine")
    assert first == loader.fingerprint_inputs("user/own/mine")
    (folder / "own.yaml").write_text(USER_PRESET.replace("0.5", "0.6"))
    assert len({missing, first, loader.fingerprint_inputs("user/own/mine")}) == 3


def test_a_broken_file_leaves_the_others_and_says_what_is_wrong(
    nodes: dict[str, Any], user_folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = user_folder / "psa_presets"
    folder.mkdir()
    (folder / "broken.yaml").write_text(USER_PRESET.replace("error_weight", "error_wait"))
    (folder / "good.yaml").write_text(USER_PRESET)
    loader = nodes["PSAPresetLoader"]
    own = [name for name in inputs(loader)["preset"][1]["options"] if name.startswith("user/")]
    assert own == ["user/good/mine"]
    assert "broken.yaml: preset 'mine': settings: unknown key 'error_wait'" in caplog.text
    assert "unknown key 'error_wait'" in loader.validate_inputs("user/broken/mine")


OFFICIAL_HEX_NAME = OFFICIAL_PRESET.replace("mine:", "0x" + "f" * 4000 + ":")
HOSTILE = [
    OFFICIAL_HEX_NAME,
    OFFICIAL_PRESET.replace("Wan2.1_14b:", "0x" + "f" * 4000 + ":"),
    USER_PRESET.replace("mine", "0x" + "f" * 4000),
    USER_PRESET.replace("0.5", "0x" + "f" * 4000),
    USER_PRESET.replace("0.5", "1" * 4301),
    USER_PRESET.replace("0.5", "1:30"),
    "[" * 30000,
    "{a: " * 8000,
    "\x00",
    "family: \ud800",
]


@pytest.mark.parametrize("text", HOSTILE, ids=lambda text: repr(text[:20]))
def test_whatever_a_file_holds_the_others_are_listed(nodes: dict[str, Any], user_folder: Path, text: str) -> None:
    assert OFFICIAL_HEX_NAME != OFFICIAL_PRESET
    folder = user_folder / "psa_presets"
    folder.mkdir()
    (folder / "first.yaml").write_text(USER_PRESET)
    (folder / "hostile.yaml").write_bytes(text.encode("utf-8", "surrogatepass"))
    (folder / "last.yml").write_text(USER_PRESET)
    loader = nodes["PSAPresetLoader"]
    own = [name for name in inputs(loader)["preset"][1]["options"] if name.startswith("user/")]
    assert own == ["user/first/mine", "user/last/mine"]
    assert "hostile.yaml: " in loader.validate_inputs("user/hostile/mine")


@pytest.mark.parametrize("error", [RecursionError, MemoryError, OverflowError, KeyError, ValueError])
def test_whatever_the_parser_does_the_others_are_listed(
    nodes: dict[str, Any],
    user_folder: Path,
    error: type[Exception],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    from psa_pack.psa_core import yaml_text

    folder = user_folder / "psa_presets"
    folder.mkdir()
    (folder / "good.yaml").write_text(USER_PRESET)
    (folder / "hostile.yaml").write_text("HOSTILE")
    read = yaml_text.read

    def fail(text: str) -> Any:
        if text == "HOSTILE":
            raise error("out of order")
        return read(text)

    monkeypatch.setattr(yaml_text, "read", fail)
    own = [name for name in inputs(nodes["PSAPresetLoader"])["preset"][1]["options"] if name.startswith("user/")]
    assert own == ["user/good/mine"]
    assert "leaving out a preset file: hostile.yaml: " in caplog.text


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="there are no named pipes on Windows")
def test_a_pipe_is_not_waited_for(nodes: dict[str, Any], user_folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = user_folder / "psa_presets"
    folder.mkdir()
    os.mkfifo(folder / "a.yaml")
    (folder / "b.yaml").symlink_to("b.yaml")
    (folder / "c.yaml").symlink_to("nowhere")
    (folder / "d.yaml").mkdir()
    (folder / "good.yaml").write_text(USER_PRESET)
    loader = nodes["PSAPresetLoader"]
    own = [name for name in inputs(loader)["preset"][1]["options"] if name.startswith("user/")]
    assert own == ["user/good/mine"]
    for name in "abcd":
        assert f"leaving out a preset file: {name}.yaml: cannot be read (" in caplog.text
        assert str(loader.validate_inputs(f"user/{name}/mine")).startswith(f"{name}.yaml: cannot be read (")
        assert loader.fingerprint_inputs(f"user/{name}/mine").startswith(f"{name}.yaml: cannot be read (")


def test_of_two_endings_the_first_counts(nodes: dict[str, Any], user_folder: Path) -> None:
    folder = user_folder / "psa_presets"
    folder.mkdir()
    (folder / "own.yml").write_text(USER_PRESET)
    loader = nodes["PSAPresetLoader"]
    assert loader.execute("user/own/mine").args[0].config.error_weight == 0.5
    (folder / "own.yaml").write_text(USER_PRESET.replace("0.5", "0.25"))
    assert loader.execute("user/own/mine").args[0].config.error_weight == 0.25
    assert inputs(loader)["preset"][1]["options"].count("user/own/mine") == 1


@pytest.mark.parametrize(
    ("choice", "message"),
    [
        ("wan2.1_14b/best", "preset: wan2.1_14b.yaml has no preset 'best'; it has balanced, quality, fast"),
        ("wan9/balanced", "preset: 'wan9/balanced' is not there; there are cogvideox1.5_5b/balanced"),
        ("user/gone/mine", "preset: 'user/gone/mine' is not there"),
        ("", "preset: '' is not there"),
        ("user/../secret/mine", "preset: 'user/../secret/mine' is not there"),
    ],
)
def test_a_preset_that_is_not_listed_is_refused(
    nodes: dict[str, Any], user_folder: Path, choice: str, message: str
) -> None:
    (user_folder / "psa_presets").mkdir()
    (user_folder / "secret.yaml").write_text(USER_PRESET)
    assert message in nodes["PSAPresetLoader"].validate_inputs(choice)


def test_a_preset_outside_the_users_folder_is_not_even_read(nodes: dict[str, Any], user_folder: Path) -> None:
    (user_folder / "psa_presets").mkdir()
    (user_folder / "secret.yaml").write_text(USER_PRESET)
    assert nodes["PSAPresetLoader"].fingerprint_inputs("user/../secret/mine") == "missing"
