"""CogVideoX weights and LoRAs in diffusers' layout: the key maps, and the same output from diffusers and ComfyUI."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from runs import record
from tiny_cogvideox import BLOCKS, HEADS, RELEASED, diffusers_model, network_class, sample

pytestmark = pytest.mark.usefixtures("one_thread", "comfyui")

TEXT = 226
MODEL = "diffusion_pytorch_model"
# What ComfyUI gives a small one of each, [channels, frames, height, width].
LATENTS = {
    "2b": (16, 2, 60, 90),
    "5b": (16, 2, 60, 90),
    "5b i2v": (32, 2, 60, 90),
    "1.5 5b": (16, 4, 16, 18),
    "1.5 5b i2v": (32, 4, 16, 18),
}


@pytest.fixture
def cogvideox() -> None:
    network_class()


def run_diffusers(model: Any, x: Tensor, context: Tensor, timestep: Tensor) -> Tensor:
    """Call the transformer as diffusers' pipeline does; latents as ComfyUI lays them out."""
    from types import SimpleNamespace

    from diffusers import CogVideoXPipeline

    config = model.config
    pipeline = SimpleNamespace(transformer=model, vae_scale_factor_spatial=8)
    _, _, frames, height, width = x.shape
    if config.use_learned_positional_embeddings:
        # At any length but 49 frames, diffusers forgets the learned table; its first rows are those of fewer frames.
        model.patch_embed.sample_frames = 4 * frames - 3
        model.patch_embed.pos_embedding = model.patch_embed.pos_embedding[:, : TEXT + frames * 30 * 45]
    rotary = CogVideoXPipeline._prepare_rotary_positional_embeddings(pipeline, height * 8, width * 8, frames, x.device)
    with torch.no_grad():
        out = model(
            x.transpose(1, 2),
            context,
            timestep,
            ofs=torch.full((1,), 2.0) if config.ofs_embed_dim else None,
            image_rotary_emb=rotary if config.use_rotary_positional_embeddings else None,
            return_dict=False,
        )[0]
    return out.transpose(1, 2)


def run_comfyui(model: Any, x: Tensor, context: Tensor, timestep: Tensor) -> Tensor:
    network = model.get_model_object("diffusion_model")
    ofs = torch.full((1,), 2.0) if network.ofs_proj_dim else None
    with torch.no_grad():
        return network(x, timestep, context, ofs=ofs)


def inputs(variant: str) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(1, *LATENTS[variant], generator=generator)
    return x, torch.randn(1, TEXT, 4096, generator=generator), torch.tensor([500.0])


def distance(out: Tensor, reference: Tensor) -> float:
    return float((out - reference).norm() / reference.norm())


def load(path: Path) -> Any:
    from psa_pack.nodes.load_cogvideox import load_cogvideox

    return load_cogvideox(str(path))


def save(model: Any, folder: Path, **options: Any) -> Path:
    """Save as diffusers does; return the file to choose."""
    model.save_pretrained(folder, **options)
    index = folder / f"{MODEL}.safetensors.index.json"
    return index if index.exists() else folder / f"{MODEL}.safetensors"


@pytest.mark.parametrize("variant", RELEASED)
def test_every_tensor_of_a_released_model_has_its_name(variant: str) -> None:
    from diffusers import CogVideoXTransformer3DModel
    from psa_pack.nodes.cogvideox_keys import rename

    with torch.device("meta"):
        keys = CogVideoXTransformer3DModel(**RELEASED[variant]).state_dict().keys()
    names = rename(keys)
    assert list(names) == list(keys)
    assert len(set(names.values())) == len(keys)


@pytest.mark.parametrize("variant", RELEASED)
def test_every_tensor_of_a_released_model_has_its_shape(variant: str) -> None:
    from diffusers import CogVideoXTransformer3DModel
    from psa_pack.nodes.cogvideox_keys import WrongTensors, check_shapes

    with torch.device("meta"):
        weights = CogVideoXTransformer3DModel(**RELEASED[variant] | {"num_layers": 2}).state_dict()
    shapes = {key: tuple(weight.shape) for key, weight in weights.items()}
    check_shapes(shapes)
    for key, right in shapes.items():
        for wrong in ((), (1,), right[:-1], (*right, 1), (*right[:-1], right[-1] + 1), (*right[:-1], 0)):
            if wrong == right or (key == "patch_embed.text_proj.weight" and wrong == (right[0], right[1] + 1)):
                continue  # another text encoder's width is no error
            with pytest.raises(WrongTensors) as refused:
                check_shapes(shapes | {key: wrong})
            # Where the sizes are read from a tensor, the first other one that does not fit may be named.
            assert re.match(r"has [\w.]+ of (shape \(.*\)|\d+ channels), which should be ", str(refused.value))
            if len(wrong) != len(right) or 0 in wrong:
                assert str(refused.value).startswith(f"has {key} of shape {wrong}, which should be (")


@pytest.mark.usefixtures("cogvideox")
@pytest.mark.parametrize("variant", RELEASED)
def test_the_new_names_are_those_of_comfyuis_class(variant: str) -> None:
    import comfy.ops
    from psa_pack.nodes.cogvideox_keys import rename

    theirs = diffusers_model(variant)
    settings = dict(theirs.config) | {"num_attention_heads": HEADS}
    accepted = set(network_class().__init__.__code__.co_varnames)
    settings = {key: value for key, value in settings.items() if key in accepted}
    ours = network_class()(**settings, operations=comfy.ops.disable_weight_init)
    assert set(rename(theirs.state_dict().keys()).values()) == set(ours.state_dict())


def test_the_position_table_is_the_one_that_diffusers_computes() -> None:
    from psa_pack.nodes.cogvideox_keys import sincos_positions

    table = sincos_positions(64 * HEADS, (13, 30, 45), TEXT, 1.875)
    torch.testing.assert_close(table, diffusers_model("2b").patch_embed.pos_embedding.float())


def test_lora_targets_are_the_layers_of_diffusers_model() -> None:
    from psa_pack.nodes.cogvideox_keys import lora_targets

    layers = {name.removesuffix(".weight") for name, _ in diffusers_model("1.5 5b i2v").named_parameters()}
    layers = {name for name in layers if not name.endswith(".bias")}
    targets = lora_targets(BLOCKS)
    assert {name.removeprefix("transformer.") for name in targets if name.startswith("transformer.")} == layers
    assert targets["transformer.transformer_blocks.1.attn1.to_out.0"] == "diffusion_model.blocks.1.attn_out.weight"


@pytest.mark.usefixtures("cogvideox")
@pytest.mark.parametrize("variant", RELEASED)
def test_diffusers_and_comfyui_give_the_same_output(variant: str, tmp_path: Path) -> None:
    theirs = diffusers_model(variant)
    ours = load(save(theirs, tmp_path))
    call = inputs(variant)
    assert distance(run_comfyui(ours, *call), run_diffusers(theirs, *call)) < 1e-5


@pytest.mark.usefixtures("cogvideox")
def test_text_positions_that_comfyui_does_not_use_are_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    theirs = diffusers_model("5b i2v")
    path = save(theirs, tmp_path)
    load(path)
    assert "positions for the text" not in caplog.text
    theirs.patch_embed.pos_embedding[:, 3] = 1
    load(save(theirs, tmp_path))
    assert f"{path.name} has positions for the text, which ComfyUI's CogVideoX does not use" in caplog.text


@pytest.mark.usefixtures("cogvideox")
def test_a_model_in_parts_is_the_same_model(tmp_path: Path) -> None:
    theirs = diffusers_model("1.5 5b")
    path = save(theirs, tmp_path, max_shard_size="3MB")
    assert path.name == f"{MODEL}.safetensors.index.json" and len(list(tmp_path.glob("*-of-*.safetensors"))) > 1
    call = inputs("1.5 5b")
    assert distance(run_comfyui(load(path), *call), run_diffusers(theirs, *call)) < 1e-5


@pytest.mark.usefixtures("cogvideox")
def test_a_model_is_reloaded_by_the_same_way(tmp_path: Path) -> None:
    path = save(diffusers_model("5b"), tmp_path)
    model = load(path)
    factory, arguments = model.cached_patcher_init
    again = factory(*arguments, disable_dynamic=True)
    assert again.get_model_object("diffusion_model").spatial_interpolation_scale == 1.0
    call = inputs("5b")
    assert torch.equal(run_comfyui(again, *call), run_comfyui(model, *call))


@pytest.mark.usefixtures("cogvideox")
@pytest.mark.parametrize("heads", [30, 48])
def test_without_its_config_only_a_2b_has_no_rotary_positions(heads: int, tmp_path: Path) -> None:
    from psa_pack.nodes.load_cogvideox import _is_rotary

    weights = {"norm_final.weight": torch.empty(64 * heads, device="meta")}
    assert _is_rotary(tmp_path / "any.safetensors", weights) is (heads != 30)
    (tmp_path / "config.json").write_text('{"_class_name": "Other", "use_rotary_positional_embeddings": true}')
    assert _is_rotary(tmp_path / "any.safetensors", weights) is (heads != 30)


@pytest.mark.usefixtures("cogvideox")
def test_a_loaded_model_samples_sparse(tmp_path: Path) -> None:
    from psa_pack.nodes.attention_patch import PSAAttentionPatch

    model = load(save(diffusers_model("1.5 5b"), tmp_path))
    inputs = {"start_percent": 0.0, "min_tokens": 0, "backend": "reference", "error_weight": 0.0}
    patched = PSAAttentionPatch.execute(model, "balanced", **inputs).args[0]
    assert distance(sample(patched), sample(model)) < 1e-5
    assert record(patched).sparse_calls == 4 * BLOCKS


@pytest.mark.usefixtures("cogvideox")
@pytest.mark.parametrize("variant", ["2b", "5b i2v"])
def test_a_model_with_a_position_table_refuses_other_resolutions(variant: str, tmp_path: Path) -> None:
    model = load(save(diffusers_model(variant), tmp_path))
    with pytest.raises(ValueError, match="renders 720x480 and at most 49 frames only, not 144x128 and 9 frames"):
        sample(model, cfg=1.0)
    assert sample(model, latent=(1, 60, 90), cfg=1.0).isfinite().all()


def lora(variant: str, prefix: str = "transformer.", rank: int = 4) -> dict[str, Tensor]:
    """A LoRA for the layers that are usually trained, as diffusers saves it."""
    generator = torch.Generator().manual_seed(5)
    weights = {}
    for name, weight in diffusers_model(variant).named_parameters():
        if weight.dim() == 2 and any(part in name for part in ("to_q", "to_k", "to_v", "to_out", "ff.net")):
            layer = prefix + name.removesuffix(".weight")
            weights[f"{layer}.lora_A.weight"] = 0.2 * torch.randn(rank, weight.shape[1], generator=generator)
            weights[f"{layer}.lora_B.weight"] = 0.2 * torch.randn(weight.shape[0], rank, generator=generator)
    return weights


def merge(model: Any, weights: dict[str, Tensor], scale: float) -> Any:
    """Add a LoRA to a diffusers model by its definition: W + scale B A."""
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for key, down in weights.items():
            if key.endswith(".lora_A.weight"):
                layer = key.removesuffix(".lora_A.weight")
                update = weights[f"{layer}.lora_B.weight"] @ down
                parameters[f"{layer.removeprefix('transformer.')}.weight"] += scale * update
    return model


def apply(model: Any, path: Path, strength: float = 1.0) -> Any:
    from psa_pack.nodes.load_cogvideox import add_lora

    return add_lora(model, str(path), strength)


@pytest.mark.usefixtures("cogvideox")
@pytest.mark.parametrize(
    ("prefix", "metadata", "strength", "scale"),
    [
        ("transformer.", None, 1.0, 1.0),
        ("transformer.", None, 0.5, 0.5),
        ("transformer.", {"transformer.r": 4, "transformer.lora_alpha": 8}, 1.0, 2.0),
        ("base_model.model.", None, 1.0, 1.0),
        ("", None, 1.0, 1.0),
    ],
)
def test_diffusers_and_comfyui_give_the_same_output_with_a_lora(
    prefix: str, metadata: dict[str, Any] | None, strength: float, scale: float, tmp_path: Path
) -> None:
    import comfy.model_management

    path = save(diffusers_model("1.5 5b"), tmp_path)
    text = {"lora_adapter_metadata": json.dumps(metadata)} if metadata else None
    save_file(lora("1.5 5b", prefix), tmp_path / "lora.safetensors", metadata=text)
    plain = load(path)
    patched = apply(plain, tmp_path / "lora.safetensors", strength)
    comfy.model_management.load_models_gpu([patched], force_full_load=True)
    call = inputs("1.5 5b")
    merged = run_diffusers(merge(diffusers_model("1.5 5b"), lora("1.5 5b"), scale), *call)
    assert distance(run_comfyui(patched, *call), merged) < 1e-5
    assert distance(run_diffusers(diffusers_model("1.5 5b"), *call), merged) > 1e-2
    comfy.model_management.unload_all_models()


@pytest.mark.usefixtures("cogvideox")
def test_a_lora_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    model = load(save(diffusers_model("1.5 5b"), tmp_path))
    path = tmp_path / "lora.safetensors"
    good = lora("1.5 5b")

    def refused(weights: dict[str, Tensor], message: str, metadata: str | None = None) -> None:
        save_file(weights, path, metadata={"lora_adapter_metadata": metadata} if metadata else None)
        with pytest.raises(ValueError, match=message):
            apply(model, path)
        assert not model.patches

    refused({"unet.down.lora_A.weight": torch.zeros(1, 2)}, r"lora\.safetensors is no LoRA .* takes unet\.down\.lora_A")
    refused({}, r"lora\.safetensors is no LoRA for this CogVideoX; nothing in it takes no keys")
    refused(good | {"text_encoder.a.lora_A.weight": torch.zeros(1)}, "nothing in it takes text_encoder.a.lora_A.weight")
    refused({key: torch.zeros(5, 5) for key in good}, r"is for another size of CogVideoX; it changes diffusion_model")
    for shape in ((), (1,), (4,), (1, 1, 1)):
        refused(
            {key: torch.zeros(shape) for key in good}, r"is for another size .* by \(.*\) times \(.*\), and the model"
        )
    down = next(key for key in good if "lora_A" in key)
    refused(good | {down: torch.zeros(3, good[down].shape[1])}, "it changes diffusion_model.* by .*, 4\\) times \\(3, ")
    alpha = down.replace("lora_A.weight", "alpha")
    refused(good | {alpha: torch.zeros(2)}, f"has {alpha}, which should be one number")
    refused(good, "metadata that are no JSON object", "[1")
    refused(good, "uses use_rslora, which this node does not know", '{"transformer.use_rslora": true}')
    path.write_bytes(b"nothing")
    with pytest.raises(ValueError, match=r"lora_name: lora\.safetensors cannot be read"):
        apply(model, path)


def test_a_lora_on_another_model_is_refused(tmp_path: Path) -> None:
    from tiny_wan import make_model

    with pytest.raises(ValueError, match="model: WanModel is no CogVideoX model"):
        apply(make_model(), tmp_path / "lora.safetensors")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda keys: {"model.a": 0, "model.b": 0},
            "is no CogVideoX transformer in diffusers' layout; it has model.a, ",
        ),
        (lambda keys: {}, "is no whole CogVideoX transformer in diffusers' layout; it lacks norm_final.bias, "),
        (lambda keys: keys | {"odd.weight": 0}, "is no CogVideoX transformer in diffusers' layout; it has odd.weight"),
        (
            lambda keys: {key: 0 for key in keys if key != "transformer_blocks.0.ff.net.2.bias"},
            "is no whole CogVideoX transformer in diffusers' layout; it lacks transformer_blocks.0.ff.net.2.bias",
        ),
        (
            lambda keys: {"transformer_blocks.999999999.norm1.linear.weight": 0},
            "it has transformer_blocks.999999999.norm1.linear.weight",
        ),
        (
            lambda keys: keys | {f"transformer_blocks.{'9' * 5000}.norm1.linear.weight": 0},
            "it has transformer_blocks.9999999999999999999999999999999 ... "
            "999999999999999999999999999999.norm1.linear.weight",
        ),
        (lambda keys: {f"transformer_blocks.{'9' * 5000}.norm1.linear.weight": 0}, "it has transformer_blocks.9999"),
        (lambda keys: {"\ud800" + "k" * 5000: 0}, "it has \\ud800kkk"),
        (lambda keys: {"blocks.0.norm1.linear.weight": 0}, "is in ComfyUI's own layout already; the node Load Diff"),
    ],
)
def test_what_is_no_cogvideox_is_refused_with_its_first_keys(change: Any, message: str) -> None:
    from psa_pack.nodes.cogvideox_keys import WrongTensors, rename

    keys = dict.fromkeys(diffusers_model("1.5 5b").state_dict(), 0)
    with pytest.raises(WrongTensors) as error:
        rename(change(keys))
    assert message in str(error.value)
    assert len(str(error.value)) < 600


@pytest.mark.usefixtures("cogvideox")
@pytest.mark.parametrize(
    ("key", "shape", "message"),
    [
        ("norm_final.weight", (1,), "norm_final.weight of 1 channels, which should be a multiple of 64"),
        ("norm_final.weight", (), "norm_final.weight of shape (), which should be (its width)"),
        ("time_embedding.linear_1.weight", (), "time_embedding.linear_1.weight of shape (), which should be (time"),
        ("patch_embed.proj.weight", (), "patch_embed.proj.weight of shape (), which should be (width, channels of a p"),
        ("patch_embed.proj.weight", (192, 16, 4, 4), "patch_embed.proj.weight of shape (192, 16, 4, 4), which should"),
        ("proj_out.weight", (8, 192), "proj_out.weight of shape (8, 192), which should be (64, 192)"),
        ("patch_embed.pos_embedding", (17776,), "patch_embed.pos_embedding of shape (17776,), which should be (1, 177"),
        ("patch_embed.pos_embedding", (1, 5, 192), "patch_embed.pos_embedding of shape (1, 5, 192), which should be ("),
        (
            "transformer_blocks.1.attn1.norm_q.weight",
            (1,),
            "transformer_blocks.1.attn1.norm_q.weight of shape (1,), which should be (64,)",
        ),
        (
            "transformer_blocks.0.norm1.linear.weight",
            (),
            "transformer_blocks.0.norm1.linear.weight of shape (), which should be (1152, 64)",
        ),
    ],
)
def test_a_weight_of_another_shape_is_named(key: str, shape: tuple[int, ...], message: str, tmp_path: Path) -> None:
    path = save(diffusers_model("5b i2v"), tmp_path)
    save_file(load_file(path) | {key: torch.zeros(shape)}, path)
    with pytest.raises(ValueError) as refused:
        load(path)
    assert str(refused.value).startswith(f"model_name: {path.name} has {message}")


@pytest.mark.usefixtures("cogvideox")
@pytest.mark.parametrize("shape", [(), (1,), (2, 3)])
def test_weights_all_of_one_odd_shape_are_refused(shape: tuple[int, ...], tmp_path: Path) -> None:
    path = save(diffusers_model("1.5 5b i2v"), tmp_path)
    save_file({key: torch.zeros(shape) for key in load_file(path)}, path)
    with pytest.raises(ValueError, match=rf"model_name: {path.name} has [\w.]+ of "):
        load(path)


@pytest.mark.usefixtures("cogvideox")
@pytest.mark.parametrize("name", ["s" * 5000, "\ud800", "\x00", "gone", "n" * 240])
def test_an_index_that_names_an_odd_file_is_refused(name: str, tmp_path: Path) -> None:
    index = tmp_path / f"{MODEL}.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": f"{name}.safetensors"}}))
    with pytest.raises(ValueError, match=rf"^model_name: {index.name} names files that are not beside it: ") as refused:
        load(index)
    assert len(str(refused.value)) < 300
    str(refused.value).encode()


@pytest.mark.usefixtures("cogvideox")
def test_a_file_that_cannot_be_loaded_is_refused(tmp_path: Path) -> None:
    path = save(diffusers_model("1.5 5b"), tmp_path, max_shard_size="3MB")
    index = json.loads(path.read_text())
    shards = sorted(set(index["weight_map"].values()))

    def refused(file: Path, message: str) -> None:
        with pytest.raises(ValueError, match=message):
            load(file)

    refused(tmp_path / shards[0], f"is one of several parts; choose {MODEL}.safetensors.index.json instead")
    gone = load_file(tmp_path / shards[1])
    (tmp_path / shards[1]).unlink()
    refused(path, f"index.json names files that are not beside it: {shards[1]}")
    save_file({key: gone[key] for key in list(gone)[1:]}, tmp_path / shards[1])
    refused(path, f"index.json is no whole CogVideoX .* it lacks {next(iter(gone))}")
    (tmp_path / shards[1]).write_bytes(b"nothing")
    refused(path, f"model_name: {shards[1]} cannot be read")
    for text in ("[", "[]", "{}", '{"weight_map": {}}', '{"weight_map": {"a": "../b.safetensors"}}'):
        path.write_text(text)
        refused(path, r"index\.json is no index of safetensors files")
    save_file({"a.weight": torch.zeros(1)}, tmp_path / "other.safetensors")
    refused(tmp_path / "other.safetensors", r"model_name: other\.safetensors is no CogVideoX .*; it has a\.weight")


def test_an_old_comfyui_is_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from psa_pack.nodes import load_cogvideox

    monkeypatch.setattr(load_cogvideox.cogvideox, "KNOWN", ())
    with pytest.raises(RuntimeError, match="this ComfyUI has no CogVideoX of its own"):
        load(tmp_path / "any.safetensors")


def test_the_loader_lists_files_and_indices_but_no_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import folder_paths
    from psa_pack.nodes.load_cogvideox import PSALoadCogVideoX

    (tmp_path / "cog").mkdir()
    names = ("a.safetensors", "a-00001-of-00002.safetensors", "a.safetensors.index.json", "config.json")
    for name in names:
        (tmp_path / "cog" / name).touch()
    monkeypatch.setattr(folder_paths, "get_folder_paths", lambda kind: [str(tmp_path)])
    (entry,) = PSALoadCogVideoX.GET_SCHEMA().inputs
    assert entry.options == [str(Path("cog") / name) for name in ("a.safetensors", "a.safetensors.index.json")]
