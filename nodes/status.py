"""The text on a node while it works: in the user's language, in lines that fit."""

from __future__ import annotations

import json
import re
import sys
import unicodedata
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import folder_paths
from comfy.cli_args import args

from .words import Report, Unfailing, Words, say_lines

COLUMNS = 30
"""Width of a line on a node of ordinary size, which else breaks in mid-word; a Chinese character takes two columns."""

# Spaces, a Chinese character or a word; a closing Chinese mark stays with what it follows.
_PIECES = re.compile(r"\s+|(?:[\u2e80-\uffef]|[^\s\u2e80-\uffef]+)[\u3001\u3002\uff09\uff0c\uff1a\uff1b]*")


def status_line(node_id: str | None) -> Report:
    """What shows sentences on a node; nobody sees them where ComfyUI runs without its server."""
    return Unfailing(partial(_send, node_id))


def _send(node_id: str | None, lines: Sequence[Words]) -> None:
    server = running_server()
    if server is not None and node_id is not None:
        server.send_progress_text(folded(say_lines(lines, user_language(server))), node_id)


def running_server() -> Any:
    """ComfyUI's PromptServer; None where there is none, as in a script."""
    return getattr(getattr(sys.modules.get("server"), "PromptServer", None), "instance", None)


def user_language(server: Any) -> str:
    """Language of the frontend that asked for the run, as it decides itself: the setting, else the browser's.

    Args:
        server: ComfyUI's PromptServer, or None.

    Returns:
        A code such as ``en``, ``zh`` or ``zh-TW``; ``en`` where nothing tells.
    """
    return _chosen_language() or _browser_language(server) or "en"


def _chosen_language() -> str:
    """The setting Comfy.Locale; empty if it was never changed, or with several users, who cannot be told apart here."""
    if args.multi_user:
        return ""
    path = Path(folder_paths.get_user_directory()) / "default" / "comfy.settings.json"
    try:
        chosen = json.loads(path.read_text("utf-8")).get("Comfy.Locale")
    except (OSError, ValueError, AttributeError, RecursionError):  # not there, or not what ComfyUI writes
        return ""
    return chosen if isinstance(chosen, str) else ""


def _browser_language(server: Any) -> str:
    """What the browser behind the running prompt likes best; it said so when it connected."""
    try:
        request = server.sockets[server.client_id]._req  # the web library has no public name for it
        languages = request.headers.get("Accept-Language", "")
        return re.split("[,;]", languages)[0].strip()
    except (AttributeError, LookupError, TypeError):  # not a server that ComfyUI has today
        return ""


def folded(text: str, columns: int = COLUMNS) -> str:
    """Break lines between words, or between Chinese characters, where they are too long.

    Args:
        text: Lines; their own breaks stay.
        columns: Widest line. A word that is wider keeps a line to itself.
    """
    return "\n".join(line for long in text.split("\n") for line in _fold(long, columns))


def _fold(line: str, columns: int) -> list[str]:
    lines, current = [], ""
    for piece in _PIECES.findall(line):
        if current and _width(current + piece.rstrip()) > columns:
            lines.append(current.rstrip())
            current = ""
        if current or not piece.isspace():
            current += piece
    return [*lines, current.rstrip()]


def _width(text: str) -> int:
    return sum(2 if unicodedata.east_asian_width(char) in "WF" else 1 for char in text)
