"""The block list and the schedule."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from psa_pack.psa_core.schedule import BlockList, BlockWeights, Schedule, percent_at


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
        ({"ramp": -0.5}, "ramp: -0.5 is not a number from 0 (one weight throughout) to 4"),
        ({"ramp": float("nan")}, "ramp: nan is not a number from 0 (one weight throughout) to 4"),
        ({"ramp": True}, "ramp: True is not a number from 0 (one weight throughout) to 4"),
        ({"block_weights": {"0": 0.3}}, "block_weights: {'0': 0.3} is not a BlockWeights"),
    ],
)
def test_a_schedule_refuses_what_it_cannot_mean(values: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError) as error:
        Schedule(**values)  # type: ignore[arg-type]
    assert str(error.value) == message


STACKS = (("double", 6), ("vace", 2))


def test_block_weights_are_for_the_main_stack_unless_another_is_named() -> None:
    weights = BlockWeights.parse({"0, 3-4": 0.3, -1: 2, "vace: -1": 0, "double: 1": 0.5})
    assert weights.resolve(STACKS) == {0: 0.3, 3: 0.3, 4: 0.3, 5: 2, 7: 0, 1: 0.5}
    assert BlockWeights.parse(weights.named()) == weights
    assert not BlockWeights.parse({}) and weights
    schedule = Schedule(block_weights=weights)
    assert [schedule.weight_at(0.5, block, STACKS) for block in range(8)] == [0.3, 0.5, 1, 0.3, 0.3, 2, 1, 0]


@pytest.mark.parametrize(
    ("named", "message"),
    [
        ({"0": 0.3, "6": 1}, "block_weights: 6 is not a block of this model, which has 6"),
        ({"5": 0.3, "-1": 1}, "block_weights: block 5 of '-1' is named twice"),
        ({"5": 0.3, "double: 5": 1}, "block_weights: block 5 of 'double: 5' is named twice"),
        ({"0, 3": 0.3, "0,3": 1}, "block_weights: '0,3' is named twice"),
        ({0: 0.3, "0": 1}, "block_weights: '0' is named twice"),
        ({"audio: 0": 0.3}, "block_weights: 'audio' is not a stack of this model, which has double, vace"),
        ({"vace: 2": 0.3}, "block_weights: 2 is not a block of this model, which has 2"),
        ({"4-1": 0.3}, "block_weights: range '4-1' runs backwards"),
        ({"": 0.3}, "block_weights: '' names no block"),
        ({"vace:": 0.3}, "block_weights: 'vace:' names no block"),
        ({"x": 0.3}, "block_weights: 'x' in 'x' is neither a block"),
        ({None: 0.3}, "block_weights: None is not text such as"),
        ({"0": -1}, "block_weights: -1 of '0' is not a number from 0 (exact) to 1000"),
        ({"0": True}, "block_weights: True of '0' is not a number"),
        ({"0": float("nan")}, "block_weights: nan of '0' is not a number"),
        ([0, 1], "block_weights: [0, 1] is not a mapping of blocks to factors such as {'0, 3-5': 0.3}"),
    ],
)
def test_block_weights_that_fit_nothing_are_refused(named: object, message: str) -> None:
    with pytest.raises(ValueError) as error:
        BlockWeights.parse(named).resolve(STACKS)
    assert str(error.value).startswith(message)


@pytest.mark.parametrize("ramp", [0, 0.5, 1, 2])
def test_the_ramp_is_a_power_of_the_share_done(ramp: float) -> None:
    schedule = Schedule(ramp=ramp, start_percent=0.3)  # which changes nothing of the ramp
    for percent in (1 / 64, 0.3, 0.5, 1.0):
        assert schedule.weight_at(percent) == pytest.approx(percent**ramp)
    assert schedule.weight_at(0) == schedule.weight_at(1 / 100) == pytest.approx(64**-ramp)
    assert Schedule(ramp=ramp).varies == bool(ramp)


@given(st.floats(0, 1), st.floats(0.2, 20))
def test_the_share_done_is_found_from_the_noise_level(percent: float, shift: float) -> None:
    def percent_to_sigma(share: float) -> float:  # of a model of ComfyUI's ModelSamplingDiscreteFlow
        left = 1 - share
        return shift * left / (1 + (shift - 1) * left)

    assert percent_at(percent_to_sigma(percent), percent_to_sigma) == pytest.approx(percent, abs=1e-8)


@pytest.mark.parametrize(("sigma", "percent"), [(1e9, 0.0), (1.01, 0.0), (1.0, 0.0), (0.0, 1.0), (-1.0, 1.0)])
def test_beyond_a_models_noise_levels_the_share_is_that_of_the_end(sigma: float, percent: float) -> None:
    assert percent_at(sigma, lambda share: 1 - share) == pytest.approx(percent, abs=1e-8)
