"""Inputs of the benchmarks; their timings need a GPU."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import attention, learned


def test_captures_are_the_models_own_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is captured gives the output that the model's attention gives."""
    seen: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = []
    forward = learned.Attention.forward

    def note(self, x, context, angles=None):
        out = forward(self, x, context, angles)
        if angles is not None:
            seen.append((self.o.weight, self.o.bias, out))
        return out

    monkeypatch.setattr(learned.Attention, "forward", note)
    monkeypatch.setattr(learned, "STEPS", 2)
    captured = learned.capture((2, 4, 6), (0.9, 0.6), seed=0, device="cpu", dtype=torch.float32)
    assert set(captured) == {0.9, 0.6}
    heads = len(learned.SUBJECTS) * 3 * 2
    q, k, v = captured[0.9]
    assert q.shape == k.shape == v.shape == (1, heads, 48, 128)
    out = torch.nn.functional.scaled_dot_product_attention(q, k, v)[:, :2]
    weight, bias, expected = seen[0]  # first subject, first step (sigma 1, nearest to .9), first block
    actual = torch.nn.functional.linear(out.transpose(1, 2).flatten(2), weight, bias)
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


def test_a_perfect_result_has_no_error() -> None:
    out = torch.randn(1, 7, 30, 64)
    chosen = attention.sample_heads(7)
    assert chosen[0] == 0
    assert chosen[-1] == 6
    assert attention.errors(out, out[:, chosen]) == {"rel_l2": 0.0, "rel_l1": 0.0, "worst_head": 0.0}
    worse = out.clone()
    worse[:, 6] *= 1.1
    assert attention.errors(worse, out[:, chosen])["worst_head"] == pytest.approx(0.1, rel=1e-4)


def test_without_a_gpu_the_benchmark_says_so(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["attention.py"])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit):
        attention.main()
    assert "there is no CUDA device to measure on" in capsys.readouterr().err
