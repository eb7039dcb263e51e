"""PSA Compare: its figures are those of the demo, and it refuses what cannot be compared."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import psa_pack  # noqa: F401  (named, so that a run of this file alone loads the pack)
import pytest
import torch
from skimage.metrics import peak_signal_noise_ratio, structural_similarity
from torch import Tensor

from run import LABEL_HEIGHT, Rendering, compare, read_frames

ROOT = Path(__file__).resolve().parent.parent
RECORD = {"sparse_calls": 12, "density": 0.33, "backend": "reference", "steps": 4, "sparse_steps": 4}


@pytest.fixture(scope="module")
def videos() -> tuple[np.ndarray, np.ndarray]:
    """The demo's video, dense and with PSA, as it is in the README: eight frames."""
    both = read_frames(ROOT / "docs/compare.webp")[:8, LABEL_HEIGHT:]
    width = both.shape[2] // 2
    return both[:, :, :width], both[:, :, width:]


def tensor(video: np.ndarray) -> Tensor:
    """A video as ComfyUI passes it on."""
    return torch.from_numpy(video.astype(np.float32) / 255)


def run(dense: Tensor, psa: Tensor) -> tuple[Tensor, str]:
    from psa_pack.nodes.compare import PSACompare

    picture, text = PSACompare.execute(dense, psa).args
    return picture, text


def test_the_figures_are_those_of_the_demo(comfyui: Path, videos: tuple[np.ndarray, np.ndarray]) -> None:
    dense, psa = videos
    demo = compare(Rendering(dense, 1.0, 1.0, None), Rendering(psa, 1.0, 1.0, RECORD), "0.3.75")
    _, text = run(tensor(dense), tensor(psa))
    assert text.startswith(f"8 frames: PSNR {demo['psnr_db']:.1f} dB, SSIM {demo['ssim']:.3f}; worst, frame ")


def test_each_frames_figures_are_scikit_images(comfyui: Path, videos: tuple[np.ndarray, np.ndarray]) -> None:
    from psa_pack.nodes.compare import psnr, squared_difference, ssim, to_bytes

    for a, b in zip(*videos, strict=True):
        ours = to_bytes(tensor(a)), to_bytes(tensor(b))
        assert (ours[0].numpy() == a).all()
        assert psnr(squared_difference(*ours)) == pytest.approx(peak_signal_noise_ratio(a, b), abs=1e-9)
        assert ssim(*ours) == pytest.approx(structural_similarity(a, b, channel_axis=-1), abs=1e-9)
    noise = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (2, 9, 7, 3), np.uint8))
    expected = structural_similarity(*noise.numpy(), channel_axis=-1)
    assert ssim(*noise) == pytest.approx(expected, abs=1e-9)


def test_values_become_bytes_as_comfyui_saves_them(comfyui: Path) -> None:
    from psa_pack.nodes.compare import to_bytes

    values = torch.tensor([-0.5, 0.0, 0.4999, 0.5, 0.99999, 1.0, 1.5])
    assert to_bytes(values).tolist() == np.clip(255.0 * values.numpy(), 0, 255).astype(np.uint8).tolist()


def test_the_picture_has_both_videos_untouched_between_its_bars(
    comfyui: Path, videos: tuple[np.ndarray, np.ndarray]
) -> None:
    dense, psa = map(tensor, videos)
    picture, _ = run(dense, psa)
    frames, height, width, _ = dense.shape
    bar = (picture.shape[1] - height) // 2
    assert picture.shape == (frames, height + 2 * bar, 2 * width, 3)
    assert picture.dtype == torch.float32 and picture.min() >= 0 and picture.max() <= 1
    torch.testing.assert_close(picture[:, bar:-bar, :width], dense)
    torch.testing.assert_close(picture[:, bar:-bar, width:], psa)
    labels = picture[:, :bar, width:]
    assert len({frame.numpy().tobytes() for frame in labels}) > 1  # each frame has its own figures
    for part in (picture[:, :bar, :width], labels, picture[:, -bar:]):
        assert part.amax(dim=(1, 2, 3)).min() > 0.9
        assert part.mean() < 0.4  # white on black


@pytest.mark.parametrize("size", [(7, 7), (16, 300), (300, 16), (2160, 256)])
def test_any_size_of_frame_gets_labels_that_fit(comfyui: Path, size: tuple[int, int]) -> None:
    height, width = size
    video = torch.rand(1, height, width, 3, generator=torch.Generator().manual_seed(0))
    picture, _ = run(video, 1 - video)
    bar = (picture.shape[1] - height) // 2
    assert picture.shape[2] == 2 * width
    if width >= 256:
        edges = torch.cat((picture[0, :bar, :1], picture[0, :bar, -1:], picture[0, -bar:, :1], picture[0, -bar:, -1:]))
        assert edges.max() == 0


def test_the_same_video_twice(comfyui: Path) -> None:
    video = torch.rand(2, 16, 24, 3, generator=torch.Generator().manual_seed(0))
    _, text = run(video, video)
    assert text == (
        "2 frames: PSNR infinite, the same picture, SSIM 1.000; worst, frame 1: PSNR infinite, the same picture, "
        "SSIM 1.000"
    )


def test_the_worst_frame_is_named(comfyui: Path) -> None:
    video = torch.full((3, 16, 16, 4), 0.5)  # with an opacity that is not looked at
    other = video.clone()
    other[1] += 0.1
    other[..., 3] = 0
    _, text = run(video, other)
    assert re.search(r"^3 frames: PSNR 2\d\.\d dB, SSIM 0\.\d+; worst, frame 2: PSNR 1\d\.\d dB", text)


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        (((2, 16, 16, 3), (3, 16, 16, 3)), "psa: 3 frames of 16x16 cannot be compared with 2 frames of 16x16 of dense"),
        (((2, 16, 16, 3), (2, 16, 32, 3)), "psa: 2 frames of 32x16 cannot be compared with 2 frames of 16x16"),
        (((2, 6, 16, 3), (2, 6, 16, 3)), "dense: frames of 16x6 are smaller than SSIM's window, 7x7"),
    ],
)
def test_what_cannot_be_compared_is_refused(comfyui: Path, shapes: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        run(*(torch.zeros(shape) for shape in shapes))


def test_the_workflow_differs_between_its_two_samplers_in_the_model_alone() -> None:
    workflow = json.loads((ROOT / "workflows/psa_compare_wan2.1_1.3b.json").read_text())
    types = {node["id"]: node["type"] for node in workflow["nodes"]}
    ends = {link: (source, slot) for link, source, slot, *_ in workflow["links"]}
    dense, psa = (node for node in workflow["nodes"] if node["type"] == "KSampler")
    assert dense["widgets_values"] == psa["widgets_values"]
    sources = [{entry["name"]: ends.get(entry["link"]) for entry in node["inputs"]} for node in (dense, psa)]
    models = [source.pop("model") for source in sources]
    assert sources[0] == sources[1] and sources[0]["seed"] is not None
    assert [types[node] for node, _ in models] == ["ModelSamplingSD3", "PSAAttentionPatch"]
    (patch,) = (node for node in workflow["nodes"] if node["type"] == "PSAAttentionPatch")
    (patched,) = (entry["link"] for entry in patch["inputs"] if entry["name"] == "model")
    assert ends[patched] == models[0]
