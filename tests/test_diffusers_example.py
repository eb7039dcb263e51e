"""docs/diffusers_wan.py as a user runs it, on a Wan pipeline of random weights and with psa_core alone."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

from psa_core.presets import parse_presets

ROOT = Path(__file__).resolve().parent.parent
EXAMPLE = ROOT / "docs/diffusers_wan.py"
SIZE = (96, 96, 17)  # width, height, frames: 5 x 6 x 6 = 180 tokens, three key blocks
STEPS, BLOCKS = 4, 3
PRESET = """
family: tiny
presets:
  exact: {error_weight: 0, schedule: {start_percent: 0, min_tokens: 0}}
  sparse: {error_weight: 0.5, schedule: {start_percent: 0.5, dense_blocks: "0", min_tokens: 0}}
  long: {error_weight: 0.5, schedule: {min_tokens: 181}}
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a whole pipeline, as from_pretrained() reads it."""
    folder: Path = tmp_path_factory.mktemp("wan")
    make_pipeline().save_pretrained(folder)
    return folder


def make_pipeline() -> Any:
    from diffusers import AutoencoderKLWan, FlowMatchEulerDiscreteScheduler, WanPipeline, WanTransformer3DModel
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast, UMT5Config, UMT5EncoderModel

    torch.manual_seed(0)
    words = Tokenizer(models.WordLevel({"<pad>": 0, "<unk>": 1, "fox": 2}, unk_token="<unk>"))
    return WanPipeline(
        tokenizer=PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", unk_token="<unk>"),
        text_encoder=UMT5EncoderModel(
            UMT5Config(vocab_size=3, d_model=32, d_kv=8, d_ff=32, num_layers=1, num_heads=4)
        ).eval(),
        vae=AutoencoderKLWan(base_dim=3, z_dim=16, dim_mult=[1, 1, 1, 1], num_res_blocks=1).eval(),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        transformer=WanTransformer3DModel(
            num_attention_heads=2,
            attention_head_dim=128,
            text_dim=32,
            freq_dim=256,
            ffn_dim=64,
            num_layers=BLOCKS,
        ).eval(),
    )


@pytest.fixture(scope="module")
def example() -> ModuleType:
    spec = importlib.util.spec_from_file_location("diffusers_wan", EXAMPLE)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["diffusers_wan"] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def render(example: ModuleType, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Any:
    """Run the example with a preset of PRESET; returns the frames and what it said."""
    import av

    (tmp_path / "tiny.yaml").write_text(PRESET)

    def run(preset: str) -> tuple[np.ndarray, str]:
        out = tmp_path / f"{preset}.mp4"
        arguments = ["fox", "--model", str(model), "--presets", str(tmp_path / "tiny.yaml"), "--preset", preset]
        arguments += ["--size", *map(str, SIZE), "--steps", str(STEPS), "--out", str(out)]
        example.main(arguments)
        with av.open(str(out)) as file:
            frames = np.stack([frame.to_ndarray(format="rgb24") for frame in file.decode(video=0)])
        return frames, capsys.readouterr().out

    return run


def test_a_sparse_video_and_what_is_said_about_it(render: Any) -> None:
    frames, said = render("sparse")
    assert frames.shape == (SIZE[2], SIZE[1], SIZE[0], 3)
    assert frames.std() > 1
    counts = re.search(r"(\d+) sparse attention calls, mean density (0\.\d+)", said)
    assert counts is not None
    assert int(counts[1]) == 2 * (STEPS // 2) * (BLOCKS - 1)  # twice: guidance
    assert float(counts[2]) < 0.9
    assert "off.mp4: 0 sparse attention calls\n" in render("off")[1]


@pytest.mark.parametrize("fused", [False, True])
def test_error_weight_zero_gives_the_latent_of_diffusers(example: ModuleType, model: Path, fused: bool) -> None:
    from diffusers import WanPipeline

    presets = parse_presets(PRESET, "tiny.yaml")
    latents = {}
    for name in ("dense", "exact", "sparse"):
        pipe = WanPipeline.from_pretrained(model)
        if fused:
            pipe.transformer.fuse_qkv_projections()
        if name != "dense":
            (run,) = example.use_psa(pipe, presets[name])
        latents[name] = pipe(
            "fox",
            width=SIZE[0],
            height=SIZE[1],
            num_frames=SIZE[2],
            num_inference_steps=STEPS,
            generator=torch.Generator().manual_seed(1),
            output_type="latent",
        ).frames
    assert run.densities
    size = latents["dense"].norm()
    assert (latents["exact"] - latents["dense"]).norm() / size < 1e-5
    assert 1e-4 < (latents["sparse"] - latents["dense"]).norm() / size < 0.2


def test_a_video_below_min_tokens_stays_dense(render: Any) -> None:
    assert "0 sparse attention calls\n" in render("long")[1]


def test_an_unknown_preset_is_refused_with_those_there_are(render: Any, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        render("best")
    assert "--preset: 'best' is not one of off, exact, sparse, long" in capsys.readouterr().err


def test_pip_installs_psa_core_and_nothing_else(tmp_path: Path) -> None:
    """``pip install .`` somewhere, then a call from elsewhere."""
    source, target = tmp_path / "source", tmp_path / "target"
    shutil.copytree(ROOT, source, ignore=shutil.ignore_patterns(".*", "benchmarks", "demo", "docs", "tests"))
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation"]
    subprocess.run([*pip, "--target", str(target), str(source)], check=True, timeout=300)
    assert sorted(path.name for path in target.iterdir() if path.suffix != ".dist-info") == ["psa_core"]
    names = {str(path.relative_to(ROOT)) for path in (ROOT / "psa_core").rglob("*.py")}
    assert {str(path.relative_to(target)) for path in (target / "psa_core").rglob("*.py")} == names
    code = (
        "import psa_core, torch\n"
        "q = torch.randn(3, 1, 2, 4 * 6 * 7, 64)\n"
        "out = psa_core.psa_attention(*q, layout=psa_core.TokenLayout((4, 6, 7)), "
        "config=psa_core.PSAConfig(error_weight=0.0))\n"
        "dense = torch.nn.functional.scaled_dot_product_attention(*q)\n"
        "print(psa_core.__file__, torch.allclose(out, dense, atol=1e-5))"
    )
    environment = os.environ | {"PYTHONPATH": str(target)}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300
    )
    assert (done.stdout, done.stderr) == (f"{target / 'psa_core/__init__.py'} True\n", "")
