"""The documents: links lead somewhere, and every figure of a table is one that was measured."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import pytest
from psa_pack.psa_core.presets import load_presets

from benchmarks import tables
from benchmarks.sentences import SAID

ROOT = Path(__file__).resolve().parent.parent
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), ROOT / "benchmarks/NOTES.md"])
# Tables of the notes that no result file holds: counts that were read once, from a compiler's output.
WITHOUT_FILE = {"| | parameters | instructions a turn; bytes spilled | beside products |"}  # what compilers give
NAMES = r"`([^`\n]+)`"
LATENTS = ("EmptyHunyuanLatentVideo", "WanImageToVideo", "Wan22ImageToVideoLatent")


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
    """Headings, tables, links, pictures, figures and commands in the same order; code where each language has it."""
    english, chinese = ((ROOT / name).read_text("utf-8") for name in ("README.md", "README_zh.md"))
    for pattern in (
        r"^(#+) ",
        r"^(\|[-|]+\|)$",
        r"(?:\]\(|src(?:set)?=\")(?!README)([^)\"]+)",
        r"(\d+\.\d+ (?:ms|s)\b|\d\.\d+x|\d+x\d+|0\.\d{3}|\d+\.\d GiB)",
        NAMES,
        r"^    (\S.*?)(?:  #.*)?$",
    ):
        both = [re.findall(pattern, text, re.MULTILINE) for text in (english, chinese.replace("_zh.png", ".png"))]
        if pattern == NAMES:
            both = [sorted(found) for found in both]
        assert both[0] == both[1], pattern


@pytest.mark.parametrize("table", tables.TABLES, ids=lambda table: f"{table.page}: {table.header}")
def test_a_table_is_what_was_measured(table: tables.Table) -> None:
    """Cell by cell; `make tables` writes them."""
    text = (ROOT / table.page).read_text("utf-8")
    assert tables.filled(text, table).splitlines() == text.splitlines()


def test_every_table_of_the_notes_is_held_to_a_file() -> None:
    held = [table.header for table in tables.TABLES if table.page == tables.NOTES]
    found = tables.tables_in((ROOT / tables.NOTES).read_text("utf-8"))
    assert sorted(found) == sorted([*held, *WITHOUT_FILE])


def test_a_table_with_other_rows_or_columns_is_refused() -> None:
    page = "| a | b |\n|---|---|\n| x | 1 |\n| y | 2 |\n"

    def fill(*rows: list[str | None]) -> str:
        return tables.filled(page, tables.Table("page", "| a | b |", lambda: list(rows)))

    assert fill([None, "1"], [None, ""]) == page.replace("| 2 |", "| |")
    for wrong in ([[None, "1"]], [[None, "1"], [None]], [[None, "1"]] * 3):
        with pytest.raises(ValueError, match=r"page, line \d"):
            fill(*wrong)
    with pytest.raises(ValueError, match=r"other has no table \| c \|"):
        tables.filled(page, tables.Table("other", "| c |", list))


@pytest.mark.parametrize(("page", "sentences"), SAID, ids=lambda value: getattr(value, "__name__", value))
def test_sentences_say_what_was_measured(page: str, sentences: Callable[[], list[str]]) -> None:
    text = " ".join((ROOT / page).read_text("utf-8").split())
    missing = [sentence for sentence in sentences() if sentence not in text]
    assert not missing, f"{page} should say\n\n" + "\n".join(missing)


def test_the_readmes_table_of_workflows() -> None:
    """Size, frames, steps and cfg of every bundled workflow."""
    rows = re.findall(r"^\| ((?:`psa_\w[^|]*)) \| (.+) \|$", (ROOT / "README.md").read_text("utf-8"), re.MULTILINE)
    said: dict[str, str] = {}
    for names, settings in rows:
        said |= dict.fromkeys(re.findall(r"`([^`]+)`", names), settings)
    assert said.keys() == {path.stem for path in (ROOT / "workflows").glob("*.json")}
    before: tuple[str, int] | None = None
    for name, settings in said.items():
        size, frames, steps, cfgs = workflow_settings(json.loads((ROOT / f"workflows/{name}.json").read_text("utf-8")))
        expected = [f"cfg {cfgs}"] if "psa_compare" not in name else []
        if settings.startswith("the same"):  # as the row above, with a LoRA of so many steps
            expected.append(f"{steps}-step LoRA")
            assert (size, frames) == before
        else:
            expected += [size, f"{frames} frames", *([f"{steps} steps"] if expected else [])]
            before = (size, frames)
        assert [part for part in expected if part not in settings] == [], name


def workflow_settings(workflow: dict[str, Any]) -> tuple[str, int, int, str]:
    """Size, frames, steps and the cfg of its samplers."""
    nodes = workflow["nodes"]
    (latent,) = [node["widgets_values"] for node in nodes if node["type"] in LATENTS]
    plain = [node["widgets_values"][2:4] for node in nodes if node["type"] == "KSampler"]
    samplers = plain or [node["widgets_values"][3:5] for node in nodes if node["type"] == "KSamplerAdvanced"]
    steps = {steps for steps, _ in samplers}
    cfgs = dict.fromkeys(f"{cfg:g}" for _, cfg in samplers)
    return f"{latent[0]}x{latent[1]}", latent[2], steps.pop(), " and ".join(cfgs)


def test_the_guide_says_what_the_presets_hold() -> None:
    guide = (ROOT / "docs/presets.md").read_text("utf-8")
    rows = dict(re.findall(r"^\| `(\w+)` \|[^|]+\| ([\d.]+ \| [\d.]+) \|$", guide, re.MULTILINE))
    for path in (ROOT / "presets").glob("*.yaml"):
        presets = load_presets(path)
        for name in ("balanced", "quality", "fast"):
            preset = presets[name]
            assert rows[name] == f"{preset.config.error_weight:g} | {preset.schedule.ramp:g}"
