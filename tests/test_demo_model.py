"""The demo's own Wan against ComfyUI's: the trained checkpoints, and what a short training writes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import clips
from prompt_node import prompts
from wan import WanDecoder, WanSize, WanTransformer

DEMO = Path(__file__).resolve().parent.parent / "demo"
MODEL, VAE = "wan_demo.safetensors", "wan_demo_vae.safetensors"
TINY = {"height": 64, "width": 96, "frames": 5, "layers": 1, "ffn-dim": 64, "decoder-width": 2}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a training of two steps, on the clips that the demo's model does not know, made up."""
    folder = tmp_path_factory.mktemp("trained")
    generator = torch.Generator().manual_seed(0)
    noise = {
        name: torch.randint(256, (clip.frames, 3, 24, 36), generator=generator, dtype=torch.uint8)
        for name, clip in clips.CLIP_SETS["second"].natural.items()
    }
    save_file(noise, str(folder / "clips.safetensors"))
    command = [sys.executable, DEMO / "train.py", "--clips", folder / "clips.safetensors", "--out", folder]
    command += ["--clip-set", "second", "--steps", "2", "--batch", "2", "--sampling-steps", "2"]
    command += [part for name, value in TINY.items() for part in (f"--{name}", str(value))]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture(params=["trained here", "shipped"])
def checkpoints(request: pytest.FixtureRequest) -> Path:
    return Path(request.getfixturevalue("trained")) if request.param == "trained here" else DEMO / "weights"


def own_transformer(path: Path) -> WanTransformer:
    weights = {name: value.float() for name, value in load_file(path).items()}
    dim = weights["head.modulation"].shape[-1]
    layers = 1 + max(int(name.split(".")[1]) for name in weights if name.startswith("blocks."))
    model = WanTransformer(WanSize(dim, layers, weights["blocks.0.ffn.0.weight"].shape[0]))
    model.load_state_dict(weights)
    return model


def largest(difference: torch.Tensor, of: torch.Tensor) -> float:
    return float(difference.abs().max() / of.abs().max())


def test_training_writes_what_it_says(trained: Path) -> None:
    names = {path.name for path in trained.iterdir()}
    assert {MODEL, VAE, "train.json", "reconstruction.png", "samples.png"} <= names


def test_another_set_of_clips_has_words_of_its_own(trained: Path) -> None:
    assert json.loads((trained / "train.json").read_text())["clip_set"] == "second"
    first, second = (clip_set.subjects for clip_set in clips.CLIP_SETS.values())
    assert first == prompts.SUBJECTS  # the only ones that the demo's node offers
    assert set(first).isdisjoint(second) and set(second) < set(prompts.WORDS)
    with pytest.raises(ValueError, match="lacks bunny, driver, cyclist"):
        clips.load(trained / "clips.safetensors", clips.CLIP_SETS["first"], (16, 24), torch.device("cpu"))


def test_drawn_clips_show_something_that_moves() -> None:
    y, x = torch.meshgrid(torch.linspace(-1, 1, 24), torch.linspace(-1.5, 1.5, 36), indexing="ij")
    for clip_set in clips.CLIP_SETS.values():
        for paint in clip_set.drawn.values():
            frames = torch.stack([paint(second, x, y) for second in (0.0, 0.5)])
            assert frames.std() > 0.05 and frames.diff(dim=0).abs().mean() > 0.01
            assert frames.amin() > -0.01 and frames.amax() < 1.01


@torch.no_grad()
def test_comfyui_takes_it_for_wan_and_computes_the_same(comfyui: Path, checkpoints: Path) -> None:
    import comfy.sd

    patcher: Any = comfy.sd.load_diffusion_model(str(checkpoints / MODEL))
    assert type(patcher.model.model_config).__name__ == "WAN21_T2V"
    patcher.patch_model()
    generator = torch.Generator().manual_seed(1)
    latent = torch.randn(2, 16, 3, 8, 12, generator=generator)
    timestep = torch.tensor([900.0, 300.0])
    text = torch.stack([prompts.embed(("bunny", prompts.MIRRORED)), prompts.embed((prompts.EMPTY, prompts.EMPTY))])
    own = own_transformer(checkpoints / MODEL)(latent, timestep, text)
    theirs = patcher.model.diffusion_model(latent, timestep, text, transformer_options={})
    assert own.abs().max() > 0
    assert largest(own - theirs, own) < 1e-5


@torch.no_grad()
def test_comfyui_decodes_the_same_pictures(comfyui: Path, checkpoints: Path) -> None:
    import comfy.sd

    # In fp64, since a norm over two channels that happen to be near 0 makes much of fp32's rounding.
    weights = load_file(checkpoints / VAE)
    decoder = WanDecoder(weights["decoder.head.0.gamma"].shape[0]).double()
    decoder.load_state_dict({name: value.double() for name, value in weights.items() if "encoder" not in name})
    vae: Any = comfy.sd.VAE(sd=weights)
    latent = torch.randn(1, 16, 4, 4, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    own = decoder(latent)
    theirs = vae.first_stage_model.double().decode(latent)
    assert own.shape == (1, 3, 13, 32, 48)
    assert own.abs().max() > 0
    assert largest(own - theirs, own) < 1e-9


def test_the_shipped_checkpoints_are_small() -> None:
    assert sum((DEMO / "weights" / name).stat().st_size for name in (MODEL, VAE)) <= 12e6


def test_prompts_are_told_apart_and_refused() -> None:
    embeddings = [prompts.embed((word, prompts.EMPTY)) for word in prompts.WORDS]
    assert len({tuple(embedding.flatten().tolist()) for embedding in embeddings}) == len(prompts.WORDS)
    with pytest.raises(ValueError, match=r"prompt: 'cat' is not one of '', 'mirrored', 'bunny'"):
        prompts.embed(("cat", prompts.EMPTY))
