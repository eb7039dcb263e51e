"""Load CogVideoX (diffusers) and Load CogVideoX LoRA: the weights that people have, in ComfyUI's own model."""

from __future__ import annotations

import json
import logging
import math
import re
from collections.abc import Mapping
from pathlib import Path
from reprlib import repr as short
from typing import Any

import comfy.lora
import comfy.sd
import comfy.utils
import folder_paths
import safetensors
import torch
from comfy.model_patcher import ModelPatcher
from comfy.patcher_extension import WrapperExecutor, WrappersMP
from comfy.weight_adapter.lora import LoRAAdapter
from comfy_api.latest import io
from torch import Tensor

from ..psa_core.models.cogvideox import (
    COGVIDEOX_2B,
    HEAD_DIM,
    TABLE_GRID,
    TABLE_SPATIAL_SCALE,
    TEXT_TOKENS,
)
from .cogvideox_keys import (
    POSITION_TABLE,
    WrongTensors,
    check_shapes,
    lora_targets,
    quote,
    rename,
    shortened,
    sincos_positions,
)
from .models import cogvideox
from .override import name_arguments

_MODEL_FOLDER = "diffusion_models"
_LORA_FOLDER = "loras"
_WEIGHTS, _INDEX = ".safetensors", ".safetensors.index.json"
_SHARD = re.compile(r"(.+)-\d{5}-of-\d{5}\.safetensors")
_INDEX_BYTES = 16 * 1024 * 1024
_LARGEST_ALPHA = 1e6
_KEY = "psa_cogvideox"

_log = logging.getLogger(__name__)


class PSALoadCogVideoX(io.ComfyNode):
    """Loads a CogVideoX transformer that diffusers has saved."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="PSALoadCogVideoX",
            display_name="Load CogVideoX (diffusers)",
            category="model/loaders",
            description=(
                "Loads the official CogVideoX weights as they are published, from the folder transformer of a "
                "diffusers repository. Put diffusion_pytorch_model.safetensors, or all of its parts together with "
                "diffusion_pytorch_model.safetensors.index.json, into a folder of its own in models/diffusion_models."
            ),
            inputs=[
                io.Combo.Input(
                    "model_name",
                    options=_model_names(),
                    tooltip=(
                        "A .safetensors file, or the .safetensors.index.json of a model in several parts. Leave "
                        "config.json beside it if you have it."
                    ),
                )
            ],
            outputs=[io.Model.Output(tooltip="The model. Connect it to PSA Attention Patch or a sampler.")],
        )

    @classmethod
    def execute(cls, model_name: str) -> io.NodeOutput:
        return io.NodeOutput(load_cogvideox(folder_paths.get_full_path_or_raise(_MODEL_FOLDER, model_name)))


class PSALoadCogVideoXLoRA(io.ComfyNode):
    """Puts a LoRA trained with diffusers or peft on a CogVideoX model."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="PSALoadCogVideoXLoRA",
            display_name="Load CogVideoX LoRA",
            category="model/loaders",
            description=(
                "Puts a CogVideoX LoRA in diffusers' or peft's layout (pytorch_lora_weights.safetensors), such as one "
                "that needs only four steps, on a CogVideoX model."
            ),
            inputs=[
                io.Model.Input("model", tooltip="A CogVideoX model. The node changes a copy of it."),
                io.Combo.Input(
                    "lora_name",
                    options=_lora_names(),
                    tooltip="A LoRA file in models/loras, a .safetensors one.",
                ),
                io.Float.Input(
                    "strength",
                    default=1.0,
                    min=-100.0,
                    max=100.0,
                    step=0.01,
                    tooltip="How strongly the LoRA changes the model; 1 as trained, 0 not at all.",
                ),
            ],
            outputs=[io.Model.Output(tooltip="A copy of the model, with the LoRA.")],
        )

    @classmethod
    def execute(cls, model: ModelPatcher, lora_name: str, strength: float = 1.0) -> io.NodeOutput:
        path = folder_paths.get_full_path_or_raise(_LORA_FOLDER, lora_name)
        return io.NodeOutput(add_lora(model, path, strength))


def load_cogvideox(path: str, disable_dynamic: bool = False) -> ModelPatcher:
    """Load a CogVideoX transformer in diffusers' layout.

    Args:
        path: A safetensors file, or the index of several.
        disable_dynamic: ComfyUI's own: load every weight at once.

    Raises:
        ValueError: naming the file and its first keys, if it is no whole CogVideoX transformer, or the key whose
            shape is not right.
        RuntimeError: this ComfyUI has no CogVideoX.
    """
    if not cogvideox.KNOWN:
        raise RuntimeError("this ComfyUI has no CogVideoX of its own; update ComfyUI to use Load CogVideoX (diffusers)")
    file = Path(path)
    weights = _read_weights(file)
    try:
        names = rename(weights.keys())
        check_shapes({key: weight.shape for key, weight in weights.items()})
    except WrongTensors as error:
        raise ValueError(f"model_name: {file.name} {error}") from error
    # Each tensor moves from one dictionary to the other; none is copied.
    weights = {names[key]: weights.pop(key) for key in list(weights)}
    version_1 = weights["patch_embed.proj.weight"].dim() == 4  # a convolution; CogVideoX1.5 has a matrix
    rotary = _is_rotary(file, weights)
    width = len(weights["norm_final.weight"])
    if not rotary:
        weights[POSITION_TABLE] = sincos_positions(width, TABLE_GRID, TEXT_TOKENS, TABLE_SPATIAL_SCALE)
    has_table = POSITION_TABLE in weights
    if has_table and width % 3:
        raise ValueError(
            f"model_name: {file.name} has norm_final.weight of {width} channels; with a position table, ComfyUI "
            "takes multiples of 3 only"
        )
    if has_table and weights[POSITION_TABLE][:, :TEXT_TOKENS].any():
        _log.warning("PSA: %s has positions for the text, which ComfyUI's CogVideoX does not use", file.name)
    options = {"disable_dynamic": True} if disable_dynamic else {}
    model = comfy.sd.load_diffusion_model_state_dict(weights, **options)
    network: Any = model.get_model_object("diffusion_model") if model else None
    if type(network) not in cogvideox.KNOWN:
        raise ValueError(f"model_name: ComfyUI does not take {file.name} for a CogVideoX; it has {quote(names)}")
    # From the keys alone, ComfyUI takes a position table for the only positions (CogVideoX-5B image to video has
    # rotary ones as well), and it stretches the rotary grid of the first version by a factor that is the table's.
    network.use_rotary_positional_embeddings = rotary
    if version_1:
        network.spatial_interpolation_scale = 1.0
    if has_table:
        model.add_wrapper_with_key(WrappersMP.DIFFUSION_MODEL, _KEY, _refuse_other_resolutions)
    model.cached_patcher_init = (load_cogvideox, (path,))
    return model


def add_lora(model: ModelPatcher, path: str, strength: float) -> ModelPatcher:
    """Put a LoRA in diffusers' or peft's layout on a copy of a CogVideoX model.

    Raises:
        ValueError: naming the model's class, or the file and its first keys, where the two do not fit together.
    """
    network = model.get_model_object("diffusion_model")
    network = getattr(network, "_orig_mod", network)
    if not isinstance(network, cogvideox.KNOWN):
        raise ValueError(f"model: {type(network).__name__} is no CogVideoX model")
    file = Path(path)
    lora, metadata = _read_tensors("lora_name", file)
    lora |= _alphas(lora, metadata or {}, file)
    if several := [key for key, weight in lora.items() if key.endswith(".alpha") and weight.numel() != 1]:
        raise ValueError(f"lora_name: {file.name} has {quote(several)}, which should be one number")
    patches = comfy.lora.load_lora(lora, lora_targets(len(cogvideox.blocks(network))), log_missing=False)
    patches = {target: patch for target, patch in patches.items() if isinstance(patch, LoRAAdapter)}
    used = {key for patch in patches.values() for key in patch.loaded_keys}
    if not patches or (unused := [key for key in lora if key not in used]):
        keys = unused if patches else lora
        raise ValueError(f"lora_name: {file.name} is no LoRA for this CogVideoX; nothing in it takes {quote(keys)}")
    shapes = {key: weight.shape for key, weight in model.model.state_dict().items()}
    for target, patch in patches.items():
        up, down, fits = tuple(patch.weights[0].shape), tuple(patch.weights[1].shape), shapes[target]
        if up != (fits[0], *down[:1]) or down[1:] != (fits[1:].numel(),):
            raise ValueError(
                f"lora_name: {file.name} is for another size of CogVideoX; it changes {target} by {up} times {down}, "
                f"and the model has {tuple(fits)}"
            )
    patched = model.clone()
    patched.add_patches(patches, strength)
    return patched


def _model_names() -> list[str]:
    names: set[str] = set()
    for folder in folder_paths.get_folder_paths(_MODEL_FOLDER):
        names.update(folder_paths.recursive_search(folder, excluded_dir_names=[".git"])[0])
    return sorted(name for name in names if name.endswith((_WEIGHTS, _INDEX)) and not _SHARD.search(name))


def _lora_names() -> list[str]:
    return [name for name in folder_paths.get_filename_list(_LORA_FOLDER) if name.endswith(_WEIGHTS)]


def _read_weights(file: Path) -> dict[str, Tensor]:
    """Map the tensors of a file, or of all that an index names, into memory."""
    if not file.name.endswith(_INDEX):
        if part := _SHARD.fullmatch(file.name):
            raise ValueError(f"model_name: {file.name} is one of several parts; choose {part[1]}{_INDEX} instead")
        shards = [file]
    else:
        shards = _read_index(file)
    progress = comfy.utils.ProgressBar(len(shards))
    weights: dict[str, Tensor] = {}
    for shard in shards:
        weights |= _read_tensors("model_name", shard)[0]
        progress.update(1)
    return weights


def _read_tensors(parameter: str, file: Path) -> tuple[dict[str, Tensor], dict[str, str] | None]:
    if file.suffix != _WEIGHTS:
        raise ValueError(f"{parameter}: {file.name} is no {_WEIGHTS} file; other formats can hold programs")
    try:
        return comfy.utils.load_torch_file(str(file), safe_load=True, return_metadata=True)
    except (OSError, RuntimeError, ValueError, safetensors.SafetensorError) as error:
        raise ValueError(f"{parameter}: {file.name} cannot be read ({shortened(str(error))})") from error


def _read_index(file: Path) -> list[Path]:
    try:
        if file.stat().st_size > _INDEX_BYTES:
            raise ValueError(f"longer than {_INDEX_BYTES} bytes")
        names = set(json.loads(file.read_text("utf-8"))["weight_map"].values())
        # Only files beside the index: its text may come from anyone.
        if not names or any(Path(name).name != name or not name.endswith(_WEIGHTS) for name in names):
            raise ValueError("weight_map does not name safetensors files beside it")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(
            f"model_name: {file.name} is no index of safetensors files ({shortened(str(error))})"
        ) from error
    shards = [file.parent / name for name in sorted(names)]
    if missing := [shard.name for shard in shards if not _is_file(shard)]:
        raise ValueError(f"model_name: {file.name} names files that are not beside it: {quote(missing)}")
    return shards


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError:  # a name longer than any file's
        return False


def _is_rotary(file: Path, weights: Mapping[str, Tensor]) -> bool:
    """Whether a model has rotary positions: as the config.json beside it says, else all but CogVideoX-2B do."""
    if POSITION_TABLE in weights:
        return True
    try:
        config = json.loads((file.parent / "config.json").read_text("utf-8"))
        if config["_class_name"] == "CogVideoXTransformer3DModel":
            return bool(config["use_rotary_positional_embeddings"])
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        pass  # none there, or another model's
    return len(weights["norm_final.weight"]) != COGVIDEOX_2B.heads * HEAD_DIM


def _refuse_other_resolutions(executor: WrapperExecutor, *args: Any, **kwargs: Any) -> Any:
    """Stop a model with a position table at any but its own resolution: it would read another place's row."""
    x = name_arguments(executor.original, args, kwargs).get("x")
    frames, rows, columns = TABLE_GRID
    if x is not None and (x.shape[2] > frames or [math.ceil(extent / 2) for extent in x.shape[3:]] != [rows, columns]):
        _, _, height, width = x.shape[-4:]
        raise ValueError(
            f"this CogVideoX renders {columns * 16}x{rows * 16} and at most {frames * 4 - 3} frames only, "
            f"not {width * 8}x{height * 8} and {x.shape[2] * 4 - 3} frames"
        )
    return executor(*args, **kwargs)


def _alphas(lora: Mapping[str, Tensor], metadata: Mapping[str, str], file: Path) -> dict[str, Tensor]:
    """The alphas that peft wrote into a file's metadata, as keys beside the layers' weights."""
    try:
        adapter = json.loads(metadata.get("lora_adapter_metadata", "{}"))
        settings = {str(key).removeprefix("transformer."): value for key, value in adapter.items()}
    except (ValueError, AttributeError, RecursionError) as error:
        raise ValueError(f"lora_name: {file.name} has metadata that are no JSON object ({error})") from error
    for key in ("alpha_pattern", "use_rslora", "use_dora"):
        if settings.get(key):
            raise ValueError(f"lora_name: {file.name} uses {key}, which this node does not know")
    alpha = settings.get("lora_alpha")
    if alpha is None or any(key.endswith(".alpha") for key in lora):
        return {}
    if type(alpha) not in (int, float) or not abs(alpha) < _LARGEST_ALPHA:
        raise ValueError(f"lora_name: {file.name} has the lora_alpha {short(alpha)}, which is no number")
    layers = {key.partition(".lora")[0] for key in lora}
    return {f"{layer}.alpha": torch.tensor(float(alpha)) for layer in layers}
