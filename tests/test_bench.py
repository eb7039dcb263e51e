"""The benchmark's reasoning; its timings need a GPU."""

from __future__ import annotations

import math

import pytest
import torch
from psa_pack.psa_core import TokenLayout, psa_attention
from psa_pack.psa_core.bench import Timing, config_of_density, describe_crossover, main
from psa_pack.psa_core.synthetic import structured


def timing(tokens: int, dense: float, sparse: float) -> Timing:
    return Timing(tokens, dense, sparse, 0.15)


def test_the_crossover_lies_between_the_last_loss_and_the_next_win() -> None:
    timings = [timing(4000, 1.0, 2.0), timing(8000, 3.0, 3.6), timing(12000, 7.0, 5.6), timing(16000, 12.0, 8.0)]
    assert describe_crossover(timings).startswith("PSA pays from about 10000 tokens on")


def test_no_crossover_is_said_as_it_is() -> None:
    assert "at every length measured, from 4000" in describe_crossover([timing(4000, 2.0, 1.0), timing(8000, 5.0, 2.0)])
    assert "not faster at 8000 tokens" in describe_crossover([timing(4000, 2.0, 1.0), timing(8000, 5.0, 6.0)])


@pytest.mark.parametrize("wanted", [0.05, 0.15, 0.6])
def test_the_weight_of_a_density_is_found(wanted: float) -> None:
    def density(config: object) -> float:
        return 1 / (1 + config.error_weight * 1e4)  # type: ignore[attr-defined]

    assert math.isclose(density(config_of_density(density, wanted)), wanted, abs_tol=0.005)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU, so the benchmark would run")
def test_without_a_gpu_it_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 1
    assert capsys.readouterr().err == "There is no CUDA device to measure on.\n"


@pytest.mark.parametrize("head_dim", [64, 128])
def test_structured_inputs_are_like_a_videos(head_dim: int) -> None:
    """The same seed gives the same bits; a tenth of the dense work comes close to dense attention."""
    grid = (6, 16, 16)
    q, k, v = structured(grid, 2, head_dim, seed=1, device="cpu", dtype=torch.float32)
    again = structured(grid, 2, head_dim, seed=1, device="cpu", dtype=torch.float32)
    assert all(torch.equal(a, b) for a, b in zip((q, k, v), again, strict=True))
    layout = TokenLayout(grid)
    exact = torch.nn.functional.scaled_dot_product_attention(q, k, v)

    def run(config):
        return psa_attention(q, k, v, layout=layout, config=config, backend="reference", stats=True)

    config = config_of_density(lambda config: float(run(config)[1].density.mean()), 0.15)
    out, stats = run(config)
    assert stats.density.mean() < 0.2
    assert (out - exact).norm() / exact.norm() < 0.1


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--heads", "0"], "'0' is not a whole number from 1 up"),
        (["--frames", "two"], "'two' is not a whole number from 1 up"),
        (["--density", "1.5"], "'1.5' is not a number above 0 and at most 1"),
        (["--density", "half"], "'half' is not a number above 0 and at most 1"),
        (["--dtype", "fp64"], "'fp64' is not one of bf16, fp16, fp32"),
    ],
)
def test_arguments_that_make_no_sense_are_refused(
    arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        main(arguments)
    assert said in capsys.readouterr().err


def test_the_table_has_a_row_for_every_length(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The command's own part; the times are made up."""
    from psa_pack.psa_core import bench

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *args: "a GPU")
    monkeypatch.setattr(bench, "reason_against", lambda *args: None)
    monkeypatch.setattr(bench, "measure", lambda grid, *args: timing(math.prod(grid), 2.0, 1.0))
    assert main(["--frames", "3", "5", "--frame", "10", "20", "--dtype", "fp16"]) == 0
    said = capsys.readouterr().out
    for tokens in (600, 1000):
        assert f"{tokens:>8}      2.000      1.000    0.150    2.00x" in said
    assert said.endswith("PSA is faster at every length measured, from 600 tokens on.\n")
