"""Every node and input is explained in every language: tooltips, translations, help pages."""

from __future__ import annotations

import asyncio
import json
import re
from pathlib import Path
from typing import Any

import psa_pack
import pytest

from node_texts import LOCALES, escaped, read, texts_of

ROOT = Path(__file__).resolve().parent.parent
HELP = ROOT / "web/docs"
CHINESE = re.compile(r"[\u4e00-\u9fff]")
SPECIAL = re.compile(r"[{}@$|]")


@pytest.fixture(scope="module")
def texts(comfyui: Path) -> dict[str, Any]:
    """The nodes' own texts."""
    extension = asyncio.run(psa_pack.comfy_entrypoint())
    nodes = asyncio.run(extension.get_node_list())
    return {node.GET_SCHEMA().node_id: texts_of(node.GET_NODE_INFO_V1()) for node in nodes}


def flat(texts: Any, path: tuple[str, ...] = ()) -> dict[tuple[str, ...], str]:
    if isinstance(texts, str):
        return {path: texts}
    return {key: text for name, inner in texts.items() for key, text in flat(inner, (*path, name)).items()}


def test_english_is_what_the_nodes_say(texts: dict[str, Any]) -> None:
    assert read("en") == texts, "run `make locales`"


def test_chinese_has_every_text_and_no_other(texts: dict[str, Any]) -> None:
    chinese = flat(read("zh"))
    assert chinese.keys() == flat(texts).keys()
    assert [path for path, text in chinese.items() if not CHINESE.search(text)] == []
    inputs = {name for node in texts.values() for name in node["inputs"]}
    for path, text in flat(texts).items():
        # Numbers and names of files stay as they are; those of inputs are translated.
        for word in re.findall(r"[\w/.-]*[_/.\d][\w/.-]*\w|-?\d", text):
            assert word in chinese[path] or word in inputs, (path, word)


@pytest.mark.parametrize("language", ["en", "zh"])
def test_no_text_is_a_command_to_the_frontend(language: str) -> None:
    for path, text in flat(read(language)).items():
        assert not SPECIAL.search(re.sub(r"\{'[{}@$|]'\}", "", text)), path
    assert escaped("{a|b}@$") == "{'{'}a{'|'}b{'}'}{'@'}{'$'}"


@pytest.mark.parametrize("language", ["en", "zh"])
def test_every_node_has_a_help_page_that_names_every_input(texts: dict[str, Any], language: str) -> None:
    translated = read(language)
    assert {folder.name for folder in HELP.iterdir()} == texts.keys()
    for name, node in translated.items():
        page = (HELP / name / f"{language}.md").read_text("utf-8")
        assert page.startswith(f"# {node['display_name']}\n")
        for key, entry in node["inputs"].items():
            assert f"**{entry['name']}**" in page, (name, key)
            assert language == "en" or f"`{key}`" in page, (name, key)


def test_chinese_has_the_categories_that_comfyui_lacks() -> None:
    assert json.loads((LOCALES / "zh/main.json").read_text("utf-8")) == {"nodeCategories": {"patch": "补丁"}}
