"""1,650 broken workflows and files beside weights: a clear error within a second and 100 MB, and nothing else happens.

With those of test_preset_fuzzing.py there are 11,650.
"""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psa_pack
import pytest
import torch
from psa_pack.psa_core.presets import Preset

from conftest import ROOT, cases
from test_preset_fuzzing import SEED, SNIPPETS, TEXTS, Watch, little_memory, mutate_tree, odd_value, refused

# Every input of every node of the pack that makes or takes a preset.
PRESET: dict[str, Any] = {
    "name": "mine", "base": ["loader", 0], "selection": "topk", "error_weight": -1.0,
    "levels": "{1: [0, 0.4], 8: [0.4, 1]}", "start_percent": 0.2, "end_percent": -1.0, "dense_blocks": "0, -1",
    "min_tokens": 64, "order": "raster", "save": False, "overwrite": False,
}  # fmt: skip
PATCH: dict[str, Any] = {
    "model": ["model", 0], "preset": "balanced", "custom_preset": ["preset", 0], "error_weight": -1.0,
    "start_percent": -1.0, "end_percent": -1.0, "dense_blocks": "", "min_tokens": -1, "backend": "reference",
    "verbose": False,
}  # fmt: skip
PROMPT: dict[str, dict[str, Any]] = {
    "model": {"class_type": "TestModel", "inputs": {}},
    "loader": {"class_type": "PSAPresetLoader", "inputs": {"preset": "wan2.1_1.3b/official_balanced"}},
    "preset": {"class_type": "PSAPreset", "inputs": PRESET},
    "patch": {"class_type": "PSAAttentionPatch", "inputs": PATCH},
    "end": {"class_type": "TestEnd", "inputs": {"model": ["patch", 0]}},
}

SHARDS = ["m-00001-of-00002.safetensors", "m-00002-of-00002.safetensors"]
INDEX = {"metadata": {"total_size": 9}, "weight_map": {"a": SHARDS[0], "b": SHARDS[0], "c": SHARDS[1]}}
CONFIG = {"_class_name": "CogVideoXTransformer3DModel", "use_rotary_positional_embeddings": True, "num_layers": 30}
ADAPTER = {
    "transformer.r": 4,
    "transformer.lora_alpha": 8,
    "transformer.alpha_pattern": {},
    "transformer.use_dora": False,
}


class Model:
    """Ends in a model."""

    FUNCTION, CATEGORY, RETURN_TYPES = "give", "test", ("MODEL",)

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:  # noqa: N802 - ComfyUI's name
        return {"required": {}}


class End:
    """Takes a model."""

    FUNCTION, CATEGORY, RETURN_TYPES, OUTPUT_NODE = "take", "test", (), True

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:  # noqa: N802 - ComfyUI's name
        return {"required": {"model": ("MODEL",)}}


@pytest.fixture(scope="module")
def watch() -> Watch:
    return Watch()


@pytest.fixture(scope="module")
def pack_nodes(comfyui: Path) -> Iterator[dict[str, Any]]:
    """The pack's nodes by name, which ComfyUI knows meanwhile."""
    import nodes

    extension = asyncio.run(psa_pack.comfy_entrypoint())
    ours = {node.GET_SCHEMA().node_id: node for node in asyncio.run(extension.get_node_list())}
    with pytest.MonkeyPatch.context() as registered:
        for name, node in {**ours, "TestModel": Model, "TestEnd": End}.items():
            registered.setitem(nodes.NODE_CLASS_MAPPINGS, name, node)
        yield ours


def mutated_prompt(chance: random.Random) -> dict[str, Any]:
    """The prompt with one to three inputs of the pack's nodes changed, as JSON carries them."""
    prompt: dict[str, Any] = json.loads(json.dumps(PROMPT))
    for _ in range(chance.randint(1, 3)):
        inputs = prompt[chance.choice(["loader", "preset", "patch"])]["inputs"]
        name = chance.choice([name for name in inputs if name != "model"])  # which ComfyUI's nodes take on trust
        action = chance.randrange(6)
        if action == 0 and len(inputs) > 1:
            del inputs[name]
        elif action == 1:
            inputs[chance.choice(TEXTS)] = odd_value(chance)
        elif action == 2:
            inputs[name] = mutate_tree({"a": inputs[name]}, chance)
        elif action == 3 and isinstance(inputs[name], str):
            inputs[name] = chance.choice([*SNIPPETS, "[" * 5000, "0x" + "f" * 9000, "1" * 5000, "x" * 10**6])
        else:
            inputs[name] = odd_value(chance)
        if isinstance(inputs.get(name), list) and len(inputs[name]) == 2:
            inputs[name].append(None)  # two are a link, and one to nowhere is ComfyUI's own affair
    return json.loads(json.dumps(prompt, skipkeys=True))


def run_prompt(prompt: dict[str, Any], nodes: dict[str, Any], model: Any, loop: Any) -> None:
    """What ComfyUI does with a prompt: validate it, then execute the nodes in turn.

    Raises:
        ValueError: what the user is told.
    """
    import execution

    _, error, good, node_errors = loop.run_until_complete(execution.validate_prompt("1", prompt, None))
    for entry in node_errors.values():
        for reason in entry["errors"]:
            # an exception of ours in there would be one that no user understands
            assert reason["type"] != "exception_during_validation", reason
    if len(good) < 2:
        raise ValueError(f"prompt: {error or node_errors}")
    known: dict[str, Any] = {"model": model}
    for name in ("loader", "preset", "patch"):
        node = nodes[prompt[name]["class_type"]]
        inputs = {key: value for key, value in prompt[name]["inputs"].items() if key in node_inputs(node)}
        for key, value in inputs.items():
            inputs[key] = known[value[0]] if isinstance(value, list) and value[:1] and value[0] in known else value
        known[name] = node.execute(**inputs).args[0]
        assert name != "preset" or isinstance(known[name], Preset)


def node_inputs(node: Any) -> set[str]:
    return {entry.id for entry in node.GET_SCHEMA().inputs}


@pytest.fixture
def loop() -> Iterator[asyncio.AbstractEventLoop]:
    loop = asyncio.new_event_loop()  # opens sockets, so only once
    yield loop
    loop.close()


def test_broken_workflows_are_refused(
    pack_nodes: dict[str, Any], user_folder: Path, watch: Watch, loop: asyncio.AbstractEventLoop
) -> None:
    from tiny_wan import make_model

    chance, model, total, errors = random.Random(SEED), make_model(), cases(150), 0
    run_prompt(json.loads(json.dumps(PROMPT)), pack_nodes, model, loop)
    with little_memory():
        for _ in range(total):
            prompt = mutated_prompt(chance)
            prompt["preset"]["inputs"].pop("save", None)
            with watch.only_reads(user_folder / "psa_presets", ROOT / "presets"):
                errors += refused(lambda prompt=prompt: run_prompt(prompt, pack_nodes, model, loop), prompt)
    assert errors > 0.5 * total


def test_a_saved_preset_lands_in_its_folder_or_nowhere(pack_nodes: dict[str, Any], user_folder: Path) -> None:
    chance = random.Random(SEED)
    parts = ["mine", "..", ".", "", "~", "a b", "CON", str(user_folder), "\x00", "psa_presets", "x" * 64, "\ud800"]
    for _ in range(cases(300)):
        inputs = {"name": chance.choice(["/", "\\", "", "."]).join(chance.choices(parts, k=chance.randint(1, 4)))}
        inputs |= {name: odd_value(chance) for name in chance.sample(list(PRESET)[2:-2], chance.randrange(2))}
        inputs |= {"save": True, "overwrite": chance.random() < 0.5}
        refused(lambda inputs=inputs: pack_nodes["PSAPreset"].execute(**{"error_weight": 0.1} | inputs), inputs)
    left = [path.relative_to(user_folder).as_posix() for path in user_folder.rglob("*")]
    assert len(left) > 1
    for name in left:
        assert name == "psa_presets" or (name.startswith("psa_presets/") and name.count("/") == 1), name
        assert name == "psa_presets" or name.endswith(".yaml")


def test_a_broken_index_of_weights_is_refused(comfyui: Path, tmp_path: Path, watch: Watch) -> None:
    from psa_pack.nodes.load_cogvideox import _read_index

    chance, path, total, errors = random.Random(SEED), tmp_path / "m.safetensors.index.json", cases(500), 0
    for shard in SHARDS:
        (tmp_path / shard).touch()
    path.write_text(json.dumps(INDEX))
    assert _read_index(path) == [tmp_path / shard for shard in SHARDS]

    def read() -> None:
        for shard in _read_index(path):
            assert shard.parent == tmp_path and shard.is_file()

    with little_memory():
        for _ in range(total):
            data = broken_json(INDEX, chance)
            path.write_bytes(data)
            with watch.only_reads(tmp_path):
                errors += refused(read, data)
    assert errors > 0.5 * total


def test_a_broken_config_beside_weights_counts_as_none(comfyui: Path, tmp_path: Path, watch: Watch) -> None:
    from psa_pack.nodes.load_cogvideox import _is_rotary

    chance, path = random.Random(SEED), tmp_path / "config.json"
    weights = {"norm_final.weight": torch.empty(64 * 48)}
    with little_memory():
        for _ in range(cases(300)):
            path.write_bytes(data := broken_json(CONFIG, chance))
            with watch.only_reads(tmp_path):
                assert not refused(lambda: _is_rotary(tmp_path / "m.safetensors", weights), data), data


def test_broken_metadata_of_a_lora_are_refused(comfyui: Path, watch: Watch) -> None:
    from psa_pack.nodes.load_cogvideox import _alphas

    chance, lora, total, errors = random.Random(SEED), {"a.lora_A.weight": torch.zeros(1)}, cases(400), 0
    with little_memory():
        for _ in range(total):
            metadata = {"lora_adapter_metadata": broken_json(ADAPTER, chance).decode("utf-8", "replace")}
            with watch.only_reads():
                errors += refused(lambda metadata=metadata: _alphas(lora, metadata, Path("m.safetensors")), metadata)
    assert errors > 0.3 * total


def broken_json(document: dict[str, Any], chance: random.Random) -> bytes:
    """A JSON document with a part changed, cut off, nested too deeply or no JSON at all."""
    tree = mutate_tree(document, chance)
    while chance.random() < 0.3:
        tree = mutate_tree(tree, chance)
    data = json.dumps(tree, skipkeys=True).encode()
    kind = chance.randrange(8)
    if kind == 0:
        return data[: chance.randrange(len(data))]
    if kind == 1:
        return chance.choice([b"[" * 10**5, b'{"a":' * 10**5, b"9" * 10**5, b"\xff\xfe", b"", b"1e999", b'"\\ud800"'])
    return data
