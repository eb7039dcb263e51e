"""The block list and the schedule."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from psa_pack.psa_core.schedule import BlockList, Schedule


@pytest.mark.parametrize(
    ("text", "blocks"),
    [
        ("", []),
        ("  ", []),
        ("0", [0]),
        ("0, 1, 38-39, -1", [0, 1, 38, 39]),
        ("-1", [39]),
        ("-3--2", [37, 38]),
        ("37 - -1", [37, 38, 39]),  # from a block counted from the start to one from the end
        ("3,3, 2-4", [2, 3, 4]),
        ("0-39", list(range(40))),
    ],
)
def test_block_lists_resolve(text: str, blocks: list[int]) -> None:
    assert sorted(BlockList.parse(text).resolve(40)) == blocks


@pytest.mark.parametrize("text", ["a", "1,", ",", "1 2", "1-", "1-2-3", "1.5", "1;2", "+1", "10000000", "--1", "0x1"])
def test_what_is_no_block_list_is_refused_with_the_part(text: str) -> None:
    with pytest.raises(ValueError, match=r"dense_blocks: .* is neither a block"):
        BlockList.parse(text)


@pytest.mark.parametrize("text", ["5-3", "-1--2"])
def test_a_backward_range_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=f"range {text!r} runs backwards"):
        BlockList.parse(text)


def test_a_range_that_runs_backwards_in_this_model_only_is_refused() -> None:
    blocks = BlockList.parse("20--20")
    assert blocks.resolve(40) == {20}
    with pytest.raises(ValueError, match="runs backwards in a model of 30 blocks"):
        blocks.resolve(30)


@pytest.mark.parametrize("text", ["2", "-3", "0-2"])
def test_a_block_that_the_model_lacks_is_refused_with_what_it_has(text: str) -> None:
    with pytest.raises(ValueError, match=r"has 2 \(0 to 1, or -2 to -1 from the end\)"):
        BlockList.parse(text).resolve(2)


def test_a_block_list_is_text() -> None:
    with pytest.raises(ValueError, match="dense_blocks: 3 is not text"):
        BlockList.parse(3)  # type: ignore[arg-type]


@given(st.lists(st.tuples(st.integers(0, 9999), st.integers(0, 9999)).map(lambda ends: (min(ends), max(ends)))))
def test_text_and_block_list_say_the_same(ranges: list[tuple[int, int]]) -> None:
    blocks = BlockList(tuple(ranges))
    assert BlockList.parse(str(blocks)) == blocks


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"start_percent": -0.1}, "start_percent: -0.1 is not a number from 0 to 1"),
        ({"end_percent": 1.5}, "end_percent: 1.5 is not a number from 0 to 1"),
        ({"end_percent": float("nan")}, "end_percent: nan is not a number from 0 to 1"),
        ({"start_percent": True}, "start_percent: True is not a number from 0 to 1"),
        ({"start_percent": "0.2"}, "start_percent: '0.2' is not a number from 0 to 1"),
        ({"start_percent": 0.5, "end_percent": 0.5}, "start_percent: 0.5 is not below end_percent, 0.5"),
        ({"min_tokens": -1}, "min_tokens: -1 is not a whole number of tokens from 0 to 2147483647"),
        ({"min_tokens": 1.0}, "min_tokens: 1.0 is not a whole number of tokens from 0 to 2147483647"),
        ({"dense_blocks": "0"}, "dense_blocks: '0' is not a BlockList"),
    ],
)
def test_a_schedule_refuses_what_it_cannot_mean(values: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError) as error:
        Schedule(**values)  # type: ignore[arg-type]
    assert str(error.value) == message
