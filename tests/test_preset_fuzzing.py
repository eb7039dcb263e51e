"""10,000 broken presets and node inputs: a clear error within a second and 100 MB, and nothing else happens."""

from __future__ import annotations

import json
import math
import os
import random
import re
import string
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import yaml
from psa_pack.psa_core.presets import (
    MAX_FILE_BYTES,
    MAX_MESSAGE,
    Preset,
    PresetError,
    dump_preset,
    load_presets,
    parse_presets,
)

from conftest import FUZZ, ROOT, cases

SECONDS, BYTES = 1.0, 100 * 2**20
SEED = random.SystemRandom().getrandbits(32) if FUZZ else 20251204

OFFICIAL = """
Wan2.1_1.3b:
  text_length: 0
  attention_configs:
    a: {type: psa, use_rearrange: true, rearrange_method: Gilbert, block_size: {m: 128, n: 64}, mask_mode: topk,
        mask_ratios: {1: [0, 0.4], 2: [0.4, 0.6], 0: [0.6, 1]}, warmup_steps: 5}
"""
SOURCES = [*(path.read_text() for path in sorted((ROOT / "presets").glob("*.yaml"))), OFFICIAL]

NUMBERS = [0, -1, 1, 3, 2**31, -(2**63), 2**64, 10**400, 1e308, -1e308, 1e-320, 0.1, float("nan"), float("inf")]
TEXTS = [
    "", " ", "\x00", "\n", "\u202e", "\ud800", "\u0131", "\U0001d7d9", "1", "-", "off", "null", "2024-99-99", "=", "<<",
    "1:2:3", "../../etc/passwd", "/etc/passwd", "..\\..\\x", "user/../x", "%s%n", "{0.__class__}", "$(touch x)", "~",
    "CON", "a" * 3000, "\u0301" * 500, "__import__('os').system('touch x')",
]  # fmt: skip
SNIPPETS = [
    "!!python/object/apply:os.system ['touch x']", "!!python/name:os.system", "!!python/module:os", "!!int ''",
    "!!timestamp x", "!!binary '%%%'", "!!set {a}", "!<tag:yaml.org,2002:python/tuple> [1]", "!x y", "! z",
    "&a [*a]", "*a", "&a [x]", "<<: {a: 1}", "? [1]: 2", '"\\UFFFFFFFF"', '"\\ud800"', "0x" + "f" * 400,
    "0x" + "f" * 4000, "? 0x" + "f" * 4000, "0x" + "f" * 9000, "1" * 5000, "0b_", "0x_", "190:59:59", "1:30", "010",
    "0o17", "1_000", "0b11", "on", "no", "2024-01-01", "2024-01-01T00:00:00Z", "=", ".inf", ".nan", "1e999", "[" * 900,
    "{a: " * 300, "- " * 900, "%YAML 9.9", "%TAG ! tag:x,2000:", "---", "...", "\t", "\ufeff", "\x85", "\u2028", "|",
    ">-", "'", '"', "a: &a [x,x,x]\nb: &b [*a,*a,*a]\nc: &c [*b,*b,*b]", "#", "? ", ": ", "[]", "{}", "@", "`",
]  # fmt: skip


def odd_value(chance: random.Random, depth: int = 0) -> Any:
    """Anything that JSON or YAML can say."""
    kind = chance.randrange(9)
    if kind < 3:
        return chance.choice(NUMBERS)
    if kind < 6:
        return chance.choice(TEXTS)
    if kind == 6 or depth > 4:
        return chance.choice([None, True, False])
    values = [odd_value(chance, depth + 1) for _ in range(chance.randrange(4))]
    if kind == 7:
        return values
    return {chance.choice([*TEXTS, 1, 2.5, None, True]): value for value in values}


def mutate_tree(tree: Any, chance: random.Random) -> Any:
    """Change, drop, rename, wrap or repeat one part of a document."""
    inside = isinstance(tree, (dict, list)) and len(tree) > 0 and chance.random() < 0.85
    if not inside:
        return [odd_value(chance), [tree], {"a": tree}, str(tree), None][chance.randrange(5)]
    copy: Any = dict(tree) if isinstance(tree, dict) else list(tree)
    at = chance.choice(list(tree)) if isinstance(tree, dict) else chance.randrange(len(tree))
    action = chance.randrange(8)
    if action == 0:
        del copy[at]
    elif action == 1 and isinstance(copy, dict):
        copy[chance.choice([*TEXTS, 1, None])] = copy.pop(at)
    elif action == 2:
        copy[at] = odd_value(chance)
    elif action == 3:
        deep: Any = copy[at]
        for _ in range(chance.choice([1, 50, 300])):
            deep = [deep]
        copy[at] = deep
    else:
        copy[at] = mutate_tree(copy[at], chance)
    return copy


def mutate_text(text: str, chance: random.Random) -> str:
    """Cut, repeat, swap characters or put a snippet in."""
    for _ in range(chance.randint(1, 4)):
        at = chance.randrange(len(text) + 1)
        to = min(at + chance.choice([0, 1, 5, 80]), len(text))
        put = chance.choice([chance.choice(SNIPPETS), chance.choice(string.printable), text[at:to] * 3, ""])
        text = text[:at] + put + text[to:]
    return text


def preset_bytes(chance: random.Random) -> bytes:
    """A preset file, broken as text, as a YAML or as a JSON document, as bytes, or far too large."""
    text, kind = chance.choice(SOURCES), chance.randrange(100)
    if kind < 45:
        return mutate_text(text, chance).encode("utf-8", "surrogatepass")
    if kind < 95:
        tree = mutate_tree(_loaded(text), chance)
        while chance.random() < 0.3:
            tree = mutate_tree(tree, chance)
        if chance.random() < 0.5 or "[" * 40 in repr(tree):  # too deep for PyYAML to write
            return json.dumps(tree, default=str, skipkeys=True).encode()
        return yaml.dump(tree, allow_unicode=True).encode("utf-8", "surrogatepass")
    if kind < 98:
        return chance.randbytes(chance.randrange(300))
    unit = chance.choice(["1,", "[", "- ", "a: {", "? ", "[[],", "{a: 1, ", "*a ", "'", "#\n", "\n", "a: \n", "0:59"])
    return ("family: x\npresets: [" + unit * (2 * MAX_FILE_BYTES // len(unit)))[: MAX_FILE_BYTES + 2].encode()


def _loaded(text: str, known: dict[str, Any] = {}) -> Any:  # noqa: B006 - a cache
    if text not in known:
        known[text] = yaml.safe_load(text)
    return known[text]


class Watch:
    """What Python does besides computing, by audit events: such a hook stays for good, so it is set once and gated."""

    FORBIDDEN = re.compile(
        r"(exec|compile|import|subprocess\..*|os\.(?!listdir|scandir)\w+|socket\..*|shutil\..*|ctypes\..*)$"
    )

    def __init__(self) -> None:
        self.seen: list[str] = []
        self.folders: tuple[str, ...] | None = None
        sys.addaudithook(self._note)

    def _note(self, event: str, arguments: tuple[Any, ...]) -> None:
        if self.folders is None:
            return
        if event == "open":
            path, mode, flags = arguments
            inside = isinstance(path, (str, os.PathLike)) and os.path.abspath(path).startswith(self.folders)
            if not inside or flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
                self.seen.append(f"open {path!r} {mode}")
        elif event in ("os.listdir", "os.scandir"):
            if not os.path.abspath(arguments[0] or ".").startswith(self.folders):
                self.seen.append(f"{event} {arguments[0]!r}")
        elif self.FORBIDDEN.match(event):
            self.seen.append(f"{event} {arguments!r}"[:200])

    @contextmanager
    def only_reads(self, *folders: Path) -> Iterator[None]:
        """Nothing may happen in here but reading in these folders."""
        self.seen.clear()
        self.folders = tuple(map(os.path.abspath, folders))
        try:
            yield
        finally:
            self.folders = None
        assert self.seen == []


@pytest.fixture(scope="module")
def watch() -> Watch:
    return Watch()


def refused(action: Callable[[], object], described: object) -> bool:
    """Whether an action is refused; it must end in time, and an error must be one for the user."""
    began, message, limit = time.thread_time(), None, math.inf
    try:
        action()
    except ValueError as error:
        message, limit = str(error), MAX_MESSAGE + len(" ... ") if isinstance(error, PresetError) else math.inf
    assert time.thread_time() - began < SECONDS, described
    if message is not None:
        assert re.search(r"\w+: ", message), described
        assert len(message) <= limit, described
        message.encode()  # can be shown
    return message is not None


@contextmanager
def little_memory() -> Iterator[None]:
    """All cases of a test together stay within the bytes that one may take (where Linux tells the peak)."""
    status, forget = Path("/proc/self/status"), Path("/proc/self/clear_refs")
    if not forget.exists():
        yield
        return

    def peak() -> int:
        (kib,) = re.findall(r"VmHWM:\s+(\d+) kB", status.read_text())
        return int(kib) * 1024

    forget.write_text("5")  # the peak begins anew
    before = peak()
    yield
    assert peak() - before < BYTES


def test_broken_preset_files_are_refused(tmp_path: Path, watch: Watch) -> None:
    chance, path = random.Random(SEED), tmp_path / "odd.yaml"
    total, errors = cases(9000), 0
    load_presets(ROOT / "presets" / "wan2.1_14b.yaml")  # imports
    with little_memory():
        for _ in range(total):
            data = preset_bytes(chance)
            path.write_bytes(data)

            def load() -> None:
                for preset in load_presets(path).values():
                    assert isinstance(preset, Preset)

            with watch.only_reads(tmp_path):
                errors += refused(load, data)
    assert errors > 0.5 * total  # the others are broken in a place that does not matter, such as a description


OWN = """
family: x
source: s
presets:
  a: {description: d, error_weight: 1, levels: [1, 8], key_block: 64, schedule: {start_percent: 0, min_tokens: 5}}
  w: {error_weight: 1, group_keys: true, schedule: {ramp: 1, block_weights: {0: 0.3, "vace: 1": 2}}, expected_work: 0.2}
  b: {selection: topk, levels: {1: [0, 0.5], 2: [0.5, 1]}, similarity_caps: {2: 0.5}, variance_term: false}
"""
SCALARS = [
    *(form.format(digits * length) for form in ("{}", "-{}", "0{}", "0x{}", "0o{}", "0b{}", "1e{}", "{}.5", "1_{}")
      for digits in "17f" for length in (1, 20, 400, 4000, 4400)),
    "1:30", "-1:30.5", "010", "08", "1_000", "on", "off", "yes", "no", "y", "~", "", "null", "=", "<<", ".inf", "-.INF",
    ".nan", "2024-01-01", "2024-99-99", "2024-01-01T00:00:00Z", "true", "1e400", "\u0661\u0662", "1 000", "0x",
]  # fmt: skip


@pytest.mark.parametrize("source", [OWN, OFFICIAL], ids=["own", "official"])
def test_an_odd_scalar_in_any_place_is_refused_or_meant(source: str, tmp_path: Path, watch: Watch) -> None:
    """In the place of every key and value of a file; what is taken for a preset can be shown and written."""
    path, lines = tmp_path / "odd.yaml", yaml.safe_dump(_loaded(source), default_flow_style=False).splitlines()
    places = [(at, colon) for at, line in enumerate(lines) for colon in (True, False) if ":" in line]
    chance = random.Random(SEED)
    load_presets(ROOT / "presets" / "wan2.1_14b.yaml")  # imports
    for scalar in SCALARS:
        for at, key in chance.sample(places, min(len(places), cases(12))):
            before, _, after = lines[at].partition(":")
            indent = before[: len(before) - len(before.lstrip(" -"))]
            changed = f"{indent}{scalar}:{after}" if key else f"{before}: {scalar}"
            path.write_text("\n".join([*lines[:at], changed, *lines[at + 1 :]]), encoding="utf-8")

            def load() -> None:
                for preset in load_presets(path).values():
                    repr(preset)
                    assert parse_presets(dump_preset(preset), "again.yaml") == {preset.name: preset}

            with watch.only_reads(tmp_path):
                refused(load, changed[:80])


def test_odd_names_reach_no_other_file(user_folder: Path, watch: Watch) -> None:
    from psa_pack.nodes.preset_loader import PSAPresetLoader, load_preset

    secret = "family: x\npresets: {a: {error_weight: 1}}"
    (user_folder / "psa_presets").mkdir()
    (user_folder / "psa_presets" / "mine.yaml").write_text(secret)
    (user_folder / "secret.yaml").write_text(secret)
    chance = random.Random(SEED)
    parts = ["user", "mine", "a", "..", ".", "", "secret", "wan2.1_14b", "balanced", "psa_presets", str(user_folder),
             "*", "mine.yaml", "secret.yaml", "\x00", "~", "C:", "..\\secret"]  # fmt: skip
    known = {"user/mine/a", "wan2.1_14b/balanced"}
    PSAPresetLoader.validate_inputs("user/mine/a")
    with little_memory():
        for _ in range(cases(400)):
            choice = chance.choice(["/", "//", "\\"]).join(chance.choices(parts, k=chance.randint(1, 6)))
            choice = chance.choice([choice, choice + chance.choice(TEXTS), "user/" + choice])
            with watch.only_reads(user_folder / "psa_presets", ROOT / "presets"):
                assert refused(lambda choice=choice: load_preset(choice), choice) == (choice not in known), choice
                PSAPresetLoader.fingerprint_inputs(choice)


def test_odd_node_inputs_are_refused(comfyui: Path, watch: Watch) -> None:
    """What a mutated workflow can hand to the patch, ComfyUI's own checks left out."""
    from psa_pack.nodes.attention_patch import PSAAttentionPatch

    from tiny_wan import make_model

    chance, model = random.Random(SEED), make_model()
    names = ["preset", "error_weight", "start_percent", "end_percent", "dense_blocks", "min_tokens", "backend"]
    PSAAttentionPatch.execute(model, "balanced")
    total, errors = cases(600), 0
    with little_memory():
        for _ in range(total):
            inputs = {name: odd_value(chance) for name in chance.sample(names, chance.randint(1, 3))}
            inputs.setdefault("preset", "balanced")
            with watch.only_reads(ROOT / "presets"):
                errors += refused(lambda inputs=inputs: PSAAttentionPatch.execute(model, **inputs), inputs)
    assert errors > 0.8 * total
    with pytest.raises(PresetError):
        PSAAttentionPatch.execute(model, "../wan2.1_14b/balanced")
