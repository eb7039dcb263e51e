"""The text on the node: short lines, in the language of the user's frontend."""

from __future__ import annotations

import asyncio
import json
import pickle
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from string import Formatter
from types import SimpleNamespace
from typing import Any

import aiohttp
import pytest
import torch
from aiohttp import web
from psa_pack.psa_core import PSAConfig, TokenLayout, capability
from psa_pack.psa_core.backends import BackendUnavailable
from psa_pack.psa_core.presets import Preset
from psa_pack.psa_core.schedule import Schedule

CHINESE = re.compile(r"[\u4e00-\u9fff]")
LAYOUT = TokenLayout((1, 4, 5))


@pytest.fixture(autouse=True)
def _comfyui(comfyui: Path) -> None:
    """Every test here imports nodes."""


def session(
    dense_blocks: frozenset[int] = frozenset(), sigma: float | None = 0.5, backend: str = "auto", **schedule: Any
) -> Any:
    from psa_pack.nodes.gate import PatchSettings
    from psa_pack.nodes.session import Session

    preset = Preset("p", "f", "", "", PSAConfig(error_weight=0.0), Schedule(**schedule))
    running = Session(PatchSettings("f p", (), preset, dense_blocks, backend, False), lambda p: 1 - p, lambda _: None)
    if sigma is not None:
        running.begin_model_call(sigma, LAYOUT)
    return running


def record(**changes: Any) -> Any:
    from psa_pack.nodes.run_record import CallRecord, RunRecord
    from psa_pack.nodes.words import Words

    dense, sparse = CallRecord(0, 0, 20, 1, 0.03, None, ()), CallRecord(1, 0, 20, 1, 0.01, 0.25, (1, 3))
    values: dict[str, Any] = {
        "title": "wan2.1_14b balanced",
        "outcome": "finished",
        "seconds": 8.42,
        "steps": 20,
        "sparse_steps": 14,
        "sparse_calls": 42,
        "dense_calls": {Words.of("before_start", percent=0.3): 18},
        "dense_attention": "",
        "other_calls": 60,
        "density": 0.507,
        "tokens": 1920,
        "backend": "triton",
        "unused_cause": None,
        "levels": (1, "block"),
        "calls": (dense, sparse),
    }
    return RunRecord(**values | changes)


def said(run: Any) -> list[str]:
    return [str(line) for line in run.summary()]


def test_a_run_in_short_lines() -> None:
    from psa_pack.nodes.status import COLUMNS

    lines = said(record())
    assert lines == [
        "attention 3.0x faster",
        "14 of 20 steps sparse",
        "mean density 0.51 (triton)",
        "dense calls: 18",
        "before start_percent 0.3",
        "finished after 8.4 s",
    ]
    assert max(map(len, [*lines, record().title])) <= COLUMNS


def test_the_main_reason_stands_for_several() -> None:
    from psa_pack.nodes.words import Words

    reasons = {Words.of("before_start", percent=0.3): 18, Words.of("dense_block"): 28}
    lines = said(record(dense_calls=reasons, outcome="interrupted"))
    assert lines[-3:] == ["dense calls: 46, most of them", "in dense_blocks", "interrupted after 8.4 s"]


def test_a_run_without_psa_says_the_cause() -> None:
    from psa_pack.nodes.words import Words

    lines = said(record(unused_cause=Words.of("no_sigma"), density=None, calls=(), dense_calls={}))
    assert lines == ["not used:", "the sampler does not tell the model its noise level", "finished after 8.4 s"]
    dense = said(record(density=None, calls=(), sparse_steps=0))
    assert dense[:2] == ["0 of 20 steps sparse", "dense calls: 18"]


@pytest.mark.parametrize(
    ("dense", "sparse", "said"),
    [
        (0.03, 0.01, "attention 3.0x faster"),
        (0.01, 0.02, "attention 2.0x slower"),
        (0.0101, 0.01, "attention as fast as dense"),
        (0.01, 0.0101, "attention as fast as dense"),
        (0.0, 0.01, ""),
        (None, 0.01, ""),
    ],
)
def test_speed_in_words(dense: float | None, sparse: float, said: str) -> None:
    from psa_pack.nodes.run_record import CallRecord, compared_with_dense

    calls = [CallRecord(0, 0, 9, 1, dense, None, ()), CallRecord(1, 0, 9, 1, sparse, 0.5, ())]
    assert [str(line) for line in compared_with_dense(calls)] == [said] * bool(said)


def test_a_batch_of_two_is_not_compared_with_one() -> None:
    """Guidance that ends early makes the later, sparse calls half as long."""
    from psa_pack.nodes.run_record import CallRecord, speedup

    calls = [CallRecord(0, 0, 9, 2, 0.04, None, ()), CallRecord(1, 0, 9, 1, 0.01, 0.5, ())]
    assert speedup(calls) is None
    assert speedup([*calls, CallRecord(1, 1, 9, 1, 0.02, None, ())]) == pytest.approx(2.0)


# The language


@pytest.fixture
def one_user(user_folder: Path) -> Callable[[str], int]:
    """Writes the settings file of ComfyUI's only user."""
    (user_folder / "default").mkdir()
    file = user_folder / "default/comfy.settings.json"
    return lambda text: file.write_text(text, "utf-8")


def language(server: Any = None) -> str:
    from psa_pack.nodes.status import user_language

    return user_language(server)


def browser(accepts: str) -> Any:
    request = SimpleNamespace(headers={"Accept-Language": accepts})
    return SimpleNamespace(client_id="tab", sockets={"tab": SimpleNamespace(_req=request)})


def test_the_setting_wins_over_the_browser(one_user: Callable[[str], int]) -> None:
    assert language(browser("zh-CN,zh;q=0.9,en;q=0.8")) == "zh-CN"
    one_user(json.dumps({"Comfy.Locale": "en"}))
    assert language(browser("zh-CN")) == "en"
    one_user(json.dumps({"Comfy.Locale": "zh"}))
    assert language() == language(browser("en-US")) == "zh"


@pytest.mark.parametrize(
    "content", ["", "{", "[]", "null", '"zh"', '{"Comfy.Locale": 3}', '{"Other": "zh"}', "[" * 10**5]
)
def test_settings_that_say_nothing_mean_english(one_user: Callable[[str], int], content: str) -> None:
    one_user(content)
    assert language() == "en"


@pytest.mark.parametrize(
    "server",
    [
        None,
        SimpleNamespace(),
        SimpleNamespace(client_id=None, sockets={}),
        SimpleNamespace(client_id="gone", sockets={}),
        SimpleNamespace(client_id="tab", sockets={"tab": object()}),
        SimpleNamespace(client_id="tab", sockets={"tab": SimpleNamespace(_req=None)}),
        browser(""),
        SimpleNamespace(client_id=[], sockets={}),
        SimpleNamespace(client_id="tab", sockets=["tab"]),
    ],
)
def test_a_server_that_says_nothing_means_english(user_folder: Path, server: Any) -> None:
    assert language(server) == "en"


def test_with_several_users_only_the_browser_tells(
    one_user: Callable[[str], int], monkeypatch: pytest.MonkeyPatch
) -> None:
    from comfy.cli_args import args

    one_user(json.dumps({"Comfy.Locale": "zh"}))
    monkeypatch.setattr(args, "multi_user", True)
    assert (language(), language(browser("zh"))) == ("en", "zh")


def test_a_real_socket_tells_its_browsers_language(user_folder: Path) -> None:
    async def connect() -> str:
        server = SimpleNamespace(client_id="tab", sockets={})

        async def handler(request: web.Request) -> web.WebSocketResponse:
            server.sockets["tab"] = socket = web.WebSocketResponse()
            await socket.prepare(request)
            await socket.receive()
            return socket

        app = web.Application()
        app.router.add_get("/ws", handler)
        runner = web.AppRunner(app)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        port = runner.addresses[0][1]
        try:
            async with (
                aiohttp.ClientSession(headers={"Accept-Language": "zh-TW,zh;q=0.9"}) as client,
                client.ws_connect(f"http://127.0.0.1:{port}/ws"),
            ):
                return language(server)
        finally:
            await runner.cleanup()

    assert asyncio.run(connect()) == "zh-TW"


# The translation


def fields(template: str) -> set[tuple[str, str]]:
    """What a sentence has room for; how several are joined is each language's own."""
    parts = ((name, form or "") for _, name, form, _ in Formatter().parse(template) if name is not None)
    return {(name, form if re.search("[a-z%]", form) and " " not in form else "") for name, form in parts}


def test_every_chinese_sentence_has_what_the_english_has() -> None:
    from psa_pack.nodes.words import SENTENCES

    for english, chinese in SENTENCES.values():
        assert english == "{english}" or fields(english) == fields(chinese), english


def test_a_sentence_is_said_in_either_language_and_its_parts_too() -> None:
    from psa_pack.nodes.words import Words, say_lines

    failure = Words.of_error(backend_error())
    lines = [Words.of("step_dense", step=3), Words.of("could_not_run", failure=failure), Words.of("said", text="Oh!")]
    assert say_lines(lines, "zh-CN") == (
        "第 3 步：稠密\nPSA 无法运行（PSA 为 NVIDIA 显卡而作；在 mps 上只有后端 reference 可用，很慢）\nOh!"
    )
    assert Words.of("steps_sparse", sparse=14, steps=20).say("zh") == "20 步中 14 步稀疏"
    english = (
        "step 3: dense\nbecause PSA could not run (PSA is made for NVIDIA GPUs; on mps only the backend 'reference' "
        "works, slowly)\nOh!"
    )
    for other in ("en", "de", "", "zhx"):
        assert say_lines(lines, other) == english


def backend_error() -> Exception:
    return BackendUnavailable(capability.Reason("only_reference", {"device": "mps"}))


def test_every_reason_of_the_core_has_a_sentence() -> None:
    from psa_pack.nodes.words import SENTENCES

    for code, english in capability.REASONS.items():
        own, chinese = SENTENCES[f"cannot_run.{code}"]
        assert own == "{english}" and CHINESE.search(chinese)
        assert fields(chinese) <= fields(english), code  # which is what the reason has values for


def test_a_sentence_is_plain_data() -> None:
    from psa_pack.nodes.words import Words

    class Silent:
        def __str__(self) -> str:
            raise RuntimeError("no text")

    words = Words.of("unknown_arguments", names=("window", torch.float64, Silent()))
    assert hash(words) == hash(Words.of("unknown_arguments", names=("window", "torch.float64", "Silent")))
    assert str(words) == "the call has arguments that PSA does not know (window, torch.float64, Silent)"
    assert pickle.loads(pickle.dumps(words)) == words
    assert Words.of("said", text="a\udc80b").say() == "a\\udc80b"


def test_an_error_of_the_core_is_said_by_its_code_where_there_is_a_sentence() -> None:
    from psa_pack.nodes.words import SENTENCES, Words

    class Coded(RuntimeError):
        code, values = "for_the_test", {"device": "mps"}

    with pytest.MonkeyPatch.context() as patched:
        patched.setitem(SENTENCES, "cannot_run.for_the_test", ("{english}", "{device} 不行"))
        words = Words.of_error(Coded("not on mps"))
        assert (words.say("en"), words.say("zh")) == ("not on mps", "mps 不行")
    assert Words.of_error(Coded("not on mps")).say("zh") == "not on mps"


def reasons() -> Iterator[Any]:
    """What the code says when something keeps it from going sparse, or wants to be known."""
    from psa_pack.nodes.models.known import identify, read_sigma
    from psa_pack.nodes.models.sequence import UnsupportedModel
    from psa_pack.nodes.override import AttentionCall

    for running, block in (
        (session(start_percent=0.6), None),
        (session(end_percent=0.4), None),
        (session(min_tokens=21), None),
        (session(frozenset({0}), start_percent=0), None),
        (session(frozenset({0}), start_percent=0), 0),
    ):
        yield running.admit(LAYOUT, block)
    failing = session(start_percent=0)
    q = torch.empty(1, 2, 20, 64, device="meta")
    assert failing.attend(q, q, q, LAYOUT, PSAConfig(error_weight=0.0), None, 0, dense=lambda: q) is None
    yield failing.admit(LAYOUT, None)
    flat, odd = torch.empty(1, 20, 128), torch.empty(1, 20, 96)
    for call in (
        AttentionCall.read(flat, flat, flat, 2, mask=flat),
        AttentionCall.read(flat, flat, flat, 2, attn_precision=torch.float64),
        AttentionCall.read(flat, flat, flat, 2, window=3),
        AttentionCall.read(odd, odd, odd, 1),
        AttentionCall.read(flat, flat.clone().requires_grad_(), flat, 2),
    ):
        assert call is not None
        yield call.unsupported_reason()
    with pytest.raises(UnsupportedModel) as unknown:
        identify(torch.nn.Linear(1, 1))
    yield unknown.value.words
    with pytest.raises(UnsupportedModel) as silent:
        read_sigma({})
    yield silent.value.words
    yield session(sigma=None).finish("finished").unused_cause
    yield session().finish("finished").unused_cause
    other = session()
    other.count_other()
    yield other.finish("finished").unused_cause
    yield from notes_of(1000, 3)
    yield from notes_of(5120, 40)


def notes_of(dim: int, blocks: int) -> tuple[Any, ...]:
    """What is noted about a Wan of that size."""
    from psa_pack.nodes.models import wan

    notes: tuple[Any, ...] = wan.facts(SimpleNamespace(dim=dim, out_dim=16, blocks=range(blocks))).notes
    return notes


def test_every_reason_and_note_is_said_in_chinese() -> None:
    from psa_pack.nodes.words import Words

    found = list(reasons())
    assert all(isinstance(words, Words) for words in found)
    assert len({str(words) for words in found}) == 18
    assert [words for words in found if not CHINESE.search(words.say("zh"))] == []


def test_every_line_of_a_run_is_said_in_chinese() -> None:
    from psa_pack.nodes.run_record import CallRecord
    from psa_pack.nodes.words import Words

    unused = Words.of("no_call")
    calls = tuple(CallRecord(step, 0, 20, 1, 0.01, 0.25, (1, 3), 0.1 * step) for step in range(2))
    for run in (
        record(),
        record(calls=calls),
        record(outcome="failed"),
        record(outcome="interrupted", unused_cause=unused),
    ):
        lines = [*run.summary(), run.in_one_line()]
        assert [line for line in lines if not CHINESE.search(line.say("zh"))] == []


# The width


def test_long_lines_break_between_words() -> None:
    from psa_pack.nodes.status import folded

    text = "no released Wan has width 256 and 3 blocks; Wan 2.1 1.3B is the nearest\nshort"
    assert folded(text) == "no released Wan has width 256\nand 3 blocks; Wan 2.1 1.3B is\nthe nearest\nshort"
    assert folded("a " + "b" * 40 + " c", 30) == "a\n" + "b" * 40 + "\nc"
    assert folded("") == ""


def test_chinese_lines_break_anywhere_but_in_words_and_before_commas() -> None:
    from psa_pack.nodes.status import folded

    assert folded("设置了 dense_blocks，而 ComfyUI 没有说明", 21) == "设置了 dense_blocks，\n而 ComfyUI 没有说明"
    assert folded("一二三四，五", 8) == "一二三\n四，五"
    for columns in (12, 20, 30):
        assert folded("稀疏调用用时" * 9, columns).replace("\n", "") == "稀疏调用用时" * 9
