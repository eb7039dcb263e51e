"""What the demo does around ComfyUI: its two workflow files, the dense one derived from them, and the comparison."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from run import Rendering, compare, find, read_frames, save_comparison, save_sheet, with_report, without_patch

DEMO = Path(__file__).resolve().parent.parent / "demo"
RECORD = {"sparse_calls": 48, "density": 0.34, "backend": "reference", "sparse_steps": 16, "steps": 20}


def api_workflow() -> dict[str, dict[str, object]]:
    return dict(json.loads((DEMO / "workflow_api.json").read_text()))


def noise(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (6, 16, 24, 3), dtype=np.uint8)


def test_without_the_patch_its_model_goes_straight_on() -> None:
    workflow = api_workflow()
    plain = without_patch(workflow)
    assert set(workflow) - set(plain) == {"2"}
    assert find(plain, "ModelSamplingSD3")["inputs"]["model"] == ["1", 0]
    assert find(workflow, "ModelSamplingSD3")["inputs"]["model"] == ["2", 0]


def test_the_report_looks_at_the_samplers_own_model() -> None:
    workflow = api_workflow()
    reported = with_report(workflow)
    assert set(reported) - set(workflow) == {"report"}
    inputs = reported["report"]["inputs"]
    assert isinstance(inputs, dict)
    assert inputs["model"] == find(workflow, "KSampler")["inputs"]["model"]
    assert workflow[inputs["samples"][0]]["class_type"] == "KSampler"


def test_both_workflow_files_are_one_workflow() -> None:
    graph = json.loads((DEMO / "workflow.json").read_text())
    nodes = {str(node["id"]): node for node in graph["nodes"]}
    workflow = api_workflow()
    assert {key: node["type"] for key, node in nodes.items()} == {
        key: node["class_type"] for key, node in workflow.items()
    }
    links = {
        (str(target), nodes[str(target)]["inputs"][slot]["name"]): [str(source), output]
        for _, source, output, target, slot, _ in graph["links"]
    }
    for key, node in workflow.items():
        inputs = node["inputs"]
        assert isinstance(inputs, dict)
        values = [value for value in inputs.values() if not isinstance(value, list)]
        drawn = [value for value in nodes[key].get("widgets_values") or [] if value != "fixed"]
        assert drawn == values
        assert {name: value for (target, name), value in links.items() if target == key} == {
            name: value for name, value in inputs.items() if isinstance(value, list)
        }


def test_the_comparison_takes_psas_own_numbers() -> None:
    frames = noise(0)
    other = frames.copy()
    other[0] ^= 255
    results = compare(Rendering(frames, 2.0, 10.0, None), Rendering(other, 1.0, 20.0, RECORD), "0.0.1")
    wanted = {"density": 0.34, "sparse_steps_share": 0.8, "backend": "reference", "comfyui_version": "0.0.1"}
    assert results.items() >= wanted.items()
    assert (results["dense_seconds"], results["psa_seconds"], results["peak_mib"]) == (2.0, 1.0, 20.0)
    error = np.mean((frames.astype(float) - other) ** 2)
    assert results["psnr_db"] == pytest.approx(10 * np.log10(255**2 / error), abs=1e-3)
    assert results["ssim"] < 5 / 6  # five frames of six are the same, the other is a negative


def test_a_run_without_psa_is_no_comparison() -> None:
    frames = noise(0)
    for record in (None, RECORD | {"sparse_calls": 0, "density": None}):
        with pytest.raises(SystemExit, match="PSA took no part in its run"):
            compare(Rendering(frames, 2.0, 10.0, None), Rendering(frames, 1.0, 20.0, record), "0.0.1")


def test_pictures_hold_both_videos(tmp_path: Path) -> None:
    dense, psa = noise(1), noise(2)
    save_comparison(dense, psa, ("dense", "PSA"), tmp_path / "compare.webp")
    frames = read_frames(tmp_path / "compare.webp")
    assert frames.shape == (6, 16 + 24, 2 * 24, 3)
    save_sheet(dense, psa, tmp_path / "sheet.png")
    with Image.open(tmp_path / "sheet.png") as sheet:
        pixels = np.asarray(sheet)
    assert pixels.shape == (3 * (16 + 24), 5 * 24, 3)
    assert (pixels[24:40, :24] == dense[0]).all()
    assert (pixels[64:80, :24] == psa[0]).all()
