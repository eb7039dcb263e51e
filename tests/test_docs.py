"""The documents: links lead somewhere, and every figure is one that was measured."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import pytest
from psa_pack.psa_core.presets import load_presets

ROOT = Path(__file__).resolve().parent.parent
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), ROOT / "benchmarks/NOTES.md"])
RESULTS = ROOT / "benchmarks/results"
NOISES = (0.9, 0.6, 0.3)


def records(name: str) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads((RESULTS / f"{name}.json").read_text("utf-8"))["records"]
    return found


def anchors(page: Path) -> set[str]:
    """Headings as GitHub makes anchors of them."""
    headings = re.findall(r"^#+ (.+)$", page.read_text("utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    text = page.read_text("utf-8")
    targets = re.findall(r"\]\(([^)]+)\)", text) + re.findall(r'(?:src|srcset)="([^"]+)"', text)
    broken = []
    for target in targets:
        if target.startswith("https://"):
            continue
        name, _, anchor = unquote(target).partition("#")
        file = page.parent / name if name else page
        if not file.exists() or (anchor and anchor not in anchors(file)):
            broken.append(target)
    assert broken == []


def test_both_readmes_say_the_same() -> None:
    """Headings, figures, code, links and pictures, in the same order."""
    english, chinese = ((ROOT / name).read_text("utf-8") for name in ("README.md", "README_zh.md"))
    for pattern in (
        r"^(#+) ",
        r"^(\|[-|]+\|)$",
        r"(?:\]\(|src(?:set)?=\")(?!README)([^)\"]+)",
        r"(\d+\.\d+ (?:ms|s)\b|\d\.\d+x|\d+x\d+|0\.\d{3})",
        r"`([^`\n]+)`",
        r"^    (\S.*?)(?:  #.*)?$",
    ):
        both = [re.findall(pattern, text, re.MULTILINE) for text in (english, chinese.replace("_zh.png", ".png"))]
        assert sorted(both[0]) == sorted(both[1]), pattern


def test_the_guides_table_of_levels() -> None:
    rows = ["| levels | noise 0.9 | 0.6 | 0.3 |", "|---|---|---|---|"]
    for choice, title in (
        ("default", "1, 2, 4, 8, block, by predicted error"),
        ("levels 1 and block", "1 and block, by predicted error"),
        ("top-k 1 2 8 skip", "1, 2, 8, skip, by rank of importance"),
    ):
        by_noise = {r["noise"]: r for r in records("fidelity-32760-nvidia-h200") if r["choice"] == choice}
        assert all(abs(r["density"] - 0.15) < 0.01 for r in by_noise.values())
        rows.append(f"| {title} | " + " | ".join(f"{by_noise[noise]['rel_l2']:.3f}" for noise in NOISES) + " |")
    assert_in_guide(rows)


def test_the_guides_table_of_error_weights() -> None:
    rows = ["| `error_weight` | noise 0.9: density, error | 0.6 | 0.3 |", "|---|---|---|---|"]
    by_key = {(r["choice"], r["noise"]): r for r in records("fidelity-32760-nvidia-h200")}
    for weight in ("0.0003", "0.001", "0.003", "0.01", "0.03", "0.1"):
        cells = [by_key[f"error_weight {weight}", noise] for noise in NOISES]
        rows.append(f"| {weight} | " + " | ".join(f"{r['density']:.2f}, {r['rel_l2']:.3f}" for r in cells) + " |")
    assert_in_guide(rows)


def test_the_guides_table_of_presets() -> None:
    by_key = {
        (r["input"], r["method"], r["preset"]): r
        for r in records("attention-nvidia-h100-80gb-hbm3")
        if r["case"] == "wan2.1_1.3b_480p_81f"
    }
    rows = ["| | noise 0.9 | 0.6 | 0.3 |", "|---|---|---|---|"]
    for name in ("quality", "balanced", "fast"):
        cells = []
        for noise in NOISES:
            sparse = by_key[f"learned {noise}", "psa", name]
            dense = by_key[f"learned {noise}", "cudnn", ""]
            faster = dense["ms"] / sparse["ms"]
            cells.append(f"{faster:.1f}x, density {sparse['density']:.2f}, error {sparse['rel_l2']:.3f}")
        rows.append(f"| `{name}` | " + " | ".join(cells) + " |")
    assert_in_guide(rows)


def seconds_per_step(vram: str = "normal") -> dict[tuple[str, str, str], float]:
    found = records("sampling-nvidia-h100-80gb-hbm3")
    return {(r["model"], r["method"], r["preset"]): r["seconds_per_step"] for r in found if r["vram"] == vram}


def test_the_readmes_table_of_steps() -> None:
    readme = (ROOT / "README.md").read_text("utf-8")
    seconds = seconds_per_step()
    models = {
        "wan2.1_14b": "Wan 2.1 14B, 1280x720, 81 frames",
        "wan2.1_1.3b": "Wan 2.1 1.3B, 832x480, 81 frames",
        "wan2.2_5b": "Wan 2.2 5B, 1280x704, 121 frames",
        "cogvideox_5b": "CogVideoX 5B, 720x480, 49 frames",
    }
    for model, title in models.items():
        dense, cudnn = seconds[model, "dense", ""], seconds[model, "dense cudnn", ""]
        sparse = seconds[model, "psa", "density 0.15"]
        assert f"| {title} | {dense:.2f} s | {cudnn:.2f} s | {sparse:.2f} s | {dense / sparse:.1f}x |" in readme
    found = records("sampling-nvidia-h100-80gb-hbm3")
    densities = [r["density"] for r in found if r["preset"] == "density 0.15"]
    assert f"measured: {min(densities):.2f} to {max(densities):.2f}" in readme
    novram = seconds_per_step("novram")
    sparse, dense = novram["wan2.1_1.3b", "psa", "balanced"], novram["wan2.1_1.3b", "dense", ""]
    peak = max(r["peak_vram_mib"] for r in found if r["vram"] == "novram")
    said = f"takes {peak / 1024:.1f} GiB, and {sparse:.2f} s a step with PSA instead of {dense:.2f} s"
    assert said in " ".join(readme.split())


def test_the_guides_table_of_start_percent() -> None:
    by_key = seconds_per_step()
    rows = [
        "| dense at first | " + " | ".join(f"{share:.0%}" for share in (1, 0.3, 0.2, 0.1, 0)) + " |",
        "|---" * 6 + "|",
    ]
    for model, title in (("wan2.1_14b", "Wan 2.1 14B"), ("wan2.1_1.3b", "Wan 2.1 1.3B"), ("wan2.2_5b", "Wan 2.2 5B")):
        dense, sparse = by_key[model, "dense cudnn", ""], by_key[model, "psa", "density 0.15"]
        means = [share * dense + (1 - share) * sparse for share in (1, 0.3, 0.2, 0.1, 0)]
        rows.append(f"| {title} | " + " | ".join(f"{mean:.2f} s" for mean in means) + " |")
    assert_in_guide(rows)


def test_the_guide_says_what_the_presets_hold() -> None:
    guide = (ROOT / "docs/presets.md").read_text("utf-8")
    rows = dict(re.findall(r"^\| `(\w+)` \|[^|]+\| ([\d.]+ \| \d+ %) \|$", guide, re.MULTILINE))
    for path in (ROOT / "presets").glob("*.yaml"):
        presets = load_presets(path)
        for name in ("balanced", "quality", "fast"):
            preset = presets[name]
            assert rows[name] == f"{preset.config.error_weight:g} | {preset.schedule.start_percent:.0%}".replace(
                "%", " %"
            )


def assert_in_guide(rows: list[str]) -> None:
    table = "\n".join(rows)
    assert table in (ROOT / "docs/presets.md").read_text("utf-8"), f"the guide should have\n\n{table}\n"
