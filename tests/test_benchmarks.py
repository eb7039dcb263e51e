"""Inputs, peers and records of the benchmarks; their timings need a GPU."""

from __future__ import annotations

import itertools
import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from benchmarks import attention, comfy_models, crossover, first_use, learned, measure, peers, sampling
from benchmarks.results_file import ResultFile
from psa_core import PSAConfig, TokenLayout, plan_order, psa_attention
from psa_core.backends import reference
from psa_core.bench import Timing
from psa_core.presets import load_presets

PRESETS = attention.ROOT / "presets"


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
    chosen = measure.sample_heads(7)
    assert chosen[0] == 0
    assert chosen[-1] == 6
    assert measure.errors(out, out[:, chosen]) == {"rel_l2": 0.0, "rel_l1": 0.0, "worst_head": 0.0}
    worse = out.clone()
    worse[:, 6] *= 1.1
    assert measure.errors(worse, out[:, chosen])["worst_head"] == pytest.approx(0.1, rel=1e-4)


@pytest.mark.parametrize("main", [attention.main, lambda: first_use.main([])], ids=["attention", "first_use"])
def test_without_a_gpu_the_benchmark_says_so(
    main: Callable[[], None], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["attention.py"])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit):
        main()
    assert "there is no CUDA device to measure on" in capsys.readouterr().err


@pytest.mark.parametrize(("grid", "text"), [((5, 14, 14), 0), ((3, 17, 19), 70)])
@pytest.mark.parametrize("key_block", peers.FLEX_KEY_BLOCKS)
def test_flex_attention_gets_the_blocks_that_psa_attends(grid: tuple[int, int, int], text: int, key_block: int) -> None:
    """Dense attention under the block mask, in block order and back, is PSA's result at levels exact and skip."""
    generator = torch.Generator().manual_seed(0)
    layout = TokenLayout(grid, video_start=text)
    q, k, v = (torch.randn(1, 2, layout.tokens, 64, generator=generator) for _ in range(3))
    config = peers.exact_blocks_config(layout, 0.6, key_block)
    call = peers.FlexCall.of(layout, q, k, v, config)

    def masked(q, k, v, block_mask, kernel_options):
        rows, columns = block_mask.BLOCK_SIZE
        blocks = block_mask.to_dense().bool()
        allowed = blocks.repeat_interleave(rows, 2).repeat_interleave(columns, 3)
        everywhere = torch.arange(allowed.shape[-1])
        allowed &= block_mask.mask_mod(0, 0, 0, everywhere)
        full = torch.zeros_like(blocks)
        for h, i in itertools.product(range(full.shape[1]), range(full.shape[2])):
            full[0, h, i, block_mask.full_kv_indices[0, h, i, : block_mask.full_kv_num_blocks[0, h, i]]] = True
        assert block_mask.mask_mod(0, 0, 0, everywhere).view(-1, columns).all(-1).where(full.any(2), True).all()
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=allowed)

    out = call.restore(call.attend(masked, *call.arrange(q, k, v)))
    expected, stats = psa_attention(q, k, v, layout=layout, config=config, stats=True)
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)
    assert call.density == pytest.approx(float(stats.density.mean()), rel=1e-6)
    assert call.density == pytest.approx(0.6, abs=key_block / layout.tokens)  # whole blocks only


def test_a_peer_that_fails_is_a_record(monkeypatch: pytest.MonkeyPatch) -> None:
    """One setting fails: its reason is recorded, the others are measured. One that cannot begin says why."""

    def timed(run, repeats):
        return run(), 2.0, 0.0

    monkeypatch.setattr(attention, "timed", timed)
    case = attention.Case((1, 4, 8), 0, 6, 64, "")
    exact = torch.randn(1, 6, 32, 64)

    def broken():
        raise ValueError("no kernel image\nand much more")

    runs = iter([peers.Run("a", lambda: exact, 1.0), peers.Run("b", broken), peers.Run("c", lambda: exact * 1.5)])
    first, second, third = attention.measure_peer(runs, case, exact, 1)
    assert first["preset"] == "a" and first["rel_l2"] == 0 and first["effective_tflops"] == pytest.approx(0.000786432)
    assert second == {"preset": "b", "failed": "ValueError: no kernel image"}
    assert third["preset"] == "c" and third["rel_l2"] == pytest.approx(0.5) and third["effective_tflops"] is None

    (timed_only,) = attention.measure_peer(iter([peers.Run("a", lambda: exact, 1.0)]), case, None, 1)
    assert timed_only == first | dict.fromkeys(("rel_l2", "rel_l1", "worst_head"))

    q = torch.zeros(1, 2, 32, 64)
    missing = peers.official(case.layout, q, q, q, 0.15, checkout=Path("/nowhere"))
    assert list(attention.measure_peer(missing, case, exact, 1)) == [
        {"preset": "", "failed": "/nowhere has no src/psa_triton"}
    ]


def test_records_survive_a_run_that_ends_early_and_give_way_to_newer_ones(tmp_path: Path) -> None:
    path, machine = tmp_path / "new" / "a.json", {"device": "GPU", "versions": {"torch": "2.11"}, "commit": "c0ffee"}

    def on_disk():
        return json.loads(path.read_text())["records"]

    results = ResultFile.open(path, machine, ("case", "method", "preset"))
    results.add({"case": "x", "method": "sol", "preset": "", "failed": "not installed"})
    assert on_disk()[0]["failed"] == "not installed"
    results.add({"case": "x", "method": "sol", "preset": "tau 1", "ms": 1})
    results.add({"case": "x", "method": "sol", "preset": "tau 2", "failed": "out of memory"})
    assert [record.get("ms", record.get("failed")) for record in on_disk()] == [1, "out of memory"]

    again = ResultFile.open(path, machine, ("case", "method", "preset"))
    again.add({"case": "x", "method": "sol", "preset": "", "failed": "not installed"})
    again.add({"case": "x", "method": "sol", "preset": "tau 1", "failed": "out of memory"})
    again.add({"case": "x", "method": "sol", "preset": "tau 2", "ms": 2})
    again.add({"case": "y", "method": "sol", "preset": "", "failed": "head dim"})
    assert [record.get("ms", record.get("failed")) for record in on_disk()] == [1, 2, "head dim"]
    again.add({"case": "x", "method": "sol", "preset": "tau 1", "ms": 3})
    assert [record.get("ms") for record in on_disk()] == [2, None, 3]


@pytest.mark.parametrize(("entry", "value"), [("device", "other"), ("versions", {"torch": "2.12"}), ("commit", "beef")])
def test_records_of_another_machine_or_commit_are_not_mixed_in(
    entry: str, value: object, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, machine = tmp_path / "a.json", {"device": "GPU", "versions": {"torch": "2.11"}, "commit": "c0ffee"}
    ResultFile.open(path, machine, ("case",)).add({"case": "x"})
    other = ResultFile.open(path, machine | {entry: value}, ("case",))
    assert other.records == []
    assert f"{entry}: {machine[entry]!r} there, {value!r} here" in capsys.readouterr().out
    assert ResultFile.open(path, machine, ("case",)).records == [{"case": "x"}]  # until something new is measured


def test_a_case_that_there_is_not_is_refused(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["attention.py", "--cases", "wan2.1_14b,wan3"])
    with pytest.raises(SystemExit):
        attention.main()
    assert "'wan3' begins none of wan2.1_14b_720p_81f, wan2.1_1.3b_480p_81f" in capsys.readouterr().err


def test_every_case_has_presets() -> None:
    for case in attention.CASES.values():
        assert (attention.ROOT / "presets" / f"{case.family}.yaml").exists()


def test_sampling_goes_through_comfyui(comfyui: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Dense and sparse runs of a small model: each block attends once a step, and sparse runs as sparse as asked."""
    arguments = ["--comfyui", str(comfyui), "--tiny", "--models", "wan2.1_1.3b", "--out", str(tmp_path)]
    sampling.main([*arguments, "--runs", "dense,quality,density", "--densities", "0.3,0.6"])
    (path,) = tmp_path.glob("sampling-tiny-*.json")
    written = json.loads(path.read_text())
    assert written["versions"]["comfyui"]
    dense, quality, sparser, denser = written["records"]
    assert [record["preset"] for record in written["records"]] == ["", "quality", "density 0.3", "density 0.6"]
    for record in written["records"]:
        assert record["weights"] == "random" and record["tokens"] == 3 * 8 * 9
        assert record["attention_calls_per_step"] == 2  # two blocks, and the prompts in one batch
        assert 0 < record["attention_share"] < 1 and record["seconds_per_step"] > 0
    assert dense["density"] == 1 and dense["method"] == "dense"
    assert quality["error_weight"] == pytest.approx(
        load_presets(PRESETS / "wan2.1_1.3b.yaml")["quality"].config.error_weight
    )
    assert sparser["density"] == pytest.approx(0.3, abs=0.1) and denser["density"] == pytest.approx(0.6, abs=0.1)
    assert sparser["error_weight"] > denser["error_weight"]

    sampling.main([*arguments, "--runs", "balanced"])
    assert len(json.loads(path.read_text())["records"]) == 5
    assert "holds 4 records of this machine and commit" in capsys.readouterr().out


def test_a_run_that_fell_back_to_dense_is_no_measurement(
    comfyui: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*args, **kwargs):
        raise RuntimeError("no such kernel")

    monkeypatch.setattr("psa_pack.nodes.session.psa_attention", broken)
    arguments = ["--comfyui", str(comfyui), "--tiny", "--models", "wan2.1_1.3b", "--out", str(tmp_path)]
    sampling.main([*arguments, "--runs", "balanced"])
    (path,) = tmp_path.glob("*.json")
    (record,) = json.loads(path.read_text())["records"]
    assert record["failed"].startswith("not every step was sparse: 0 sparse calls")
    assert "no such kernel" in record["failed"]


@pytest.mark.parametrize("vram", ["lowvram", "novram"])
def test_memory_is_spared_on_a_gpu_only(
    vram: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit):
        sampling.main(["--tiny", "--comfyui", "/nowhere", "--vram", vram])
    assert "argument --vram: without a CUDA device there is no memory to spare" in capsys.readouterr().err


def test_the_density_is_looked_for_in_blocks_all_over_the_model() -> None:
    comfy_models.import_pack()
    probe = sampling.KeptInputs(comfy_models.MODELS["wan2.1_14b"], step=1)
    call = SimpleNamespace(q=0, k=0, v=0, heads_first=lambda _: torch.full((2, 1), float(probe._seen)))
    for _ in range(120):
        probe.see(call, lambda: None)
    assert [int(q.item()) for q, _, _ in probe._kept] == [43, 50, 56, 63, 70, 76]


def test_first_use_is_timed_with_the_self_check_in_it() -> None:
    record = first_use.measure_here(64, 2, ((2, 9, 9), (1, 8, 9)), "cpu")
    assert record["seconds"] > record["self_check_seconds"] > 0
    assert record["second_call_seconds"] > 0 and record["other_size_seconds"] > 0
    assert record["kernels"] == record["kernels_of_other_size"] == 0  # interpreted


def test_the_models_have_the_sizes_of_the_attention_cases() -> None:
    for case in attention.CASES.values():
        if model := comfy_models.MODELS.get(case.family):
            assert model.grid == case.grid and model.tokens == case.layout.tokens
            heads = model.settings.get("num_heads", model.settings.get("num_attention_heads"))
            assert heads == case.heads


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--models", "wan3"], "'wan3' is not one of wan2.1_14b, wan2.1_1.3b, wan2.2_5b, cogvideox_5b"),
        (["--densities", "0.3,2"], "'0.3,2' is not numbers between 0 and 1"),
        (["--steps", "1"], "1 is less than 2"),
        (["--runs", "dense,best"], "'best' is not one of dense, dense cudnn, balanced"),
    ],
)
def test_what_sampling_cannot_do_is_refused(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        sampling.main(["--tiny", "--comfyui", "/nowhere", *arguments])
    assert message in capsys.readouterr().err
    with pytest.raises(ValueError, match="'/nowhere' is not a ComfyUI source folder"):
        sampling.main(["--tiny", "--comfyui", "/nowhere"])


def test_the_matched_weight_is_the_largest_with_the_wanted_error() -> None:
    config = attention.config_of_error(lambda config: config.error_weight**0.5, 0.1, PSAConfig(error_weight=0.0))
    assert 0.95 * 0.01 < config.error_weight <= 0.01


# Measured by commits before the sort was counted: a new measurement under the same name has to obey.
BEFORE_THE_SORT_COUNTED = {
    "attention-nvidia-h100-80gb-hbm3.json": "95ab7bb32c99266bda92f78e4bc7d7025e219c81",
    "attention-nvidia-h200.json": "f8b9d56",
    "second-host-attention-nvidia-h200.json": "a02b198",
}
SORTED_THERE = {"official_balanced", "top-k, key blocks of 64", "density 0.15, 256 MiB"}


@pytest.mark.parametrize("path", sorted(attention.RESULTS.glob("*.json")), ids=lambda path: path.name)
def test_no_call_took_more_memory_than_its_limit(path: Path) -> None:
    """Limits are those of the records; older ones say in their preset's name where it was not the default."""
    document = json.loads(path.read_text("utf-8"))
    records = document.get("records", []) if isinstance(document, dict) else []
    beyond = []
    for record in records:
        if record.get("method") == "psa" and "extra_mib" in record:
            named = attention.SMALL_WORKSPACE if record["preset"].endswith("256 MiB") else PSAConfig.workspace_mib
            limit = record.get("workspace_mib", named)
            known = BEFORE_THE_SORT_COUNTED.get(path.name) == document["commit"] and record["preset"] in SORTED_THERE
            if record["extra_mib"] > limit and not known:
                beyond.append((record["case"], record["input"], record["preset"], round(record["extra_mib"]), limit))
    assert not beyond


def test_stages_are_timed_in_the_chunks_of_the_call(monkeypatch: pytest.MonkeyPatch) -> None:
    """Both as many heads at a time, and nothing that the call leaves out."""
    layout = TokenLayout((2, 9, 10))
    q, k, v = torch.randn(3, 1, 7, layout.tokens, 64)
    case = attention.Case(layout.grid, 0, 7, 64, "")
    config = PSAConfig(error_weight=0.3)
    order = plan_order(layout, config, "cpu")
    least = reference.workspace_bytes_per_head(q, order, config)
    monkeypatch.setattr(reference, "workspace_bytes_per_head", lambda *args: least - least % -(2**20) - 1)
    mib = 5 * -(-least // 2**20)  # five heads at most: two chunks, of four and three
    config = PSAConfig(error_weight=0.3, workspace_mib=mib)
    seen: list[tuple[str, int]] = []

    def noting(stage: str) -> Callable[..., object]:
        run = getattr(reference, stage)

        def note(*args):
            seen.append((stage, (args[0] if stage == "prepare" else args[0].q).shape[1]))
            return run(*args)

        return note

    for stage in attention.STAGES:
        monkeypatch.setattr(reference, stage, noting(stage))
    psa_attention(q, k, v, layout=layout, config=config, backend="reference", order=order, stats=True)
    called, seen[:] = seen.copy(), []
    monkeypatch.setattr(attention, "resolve", lambda *args: reference)
    monkeypatch.setattr(attention, "timed", lambda run, repeats: (run(), 1.0, 0.0))
    assert attention.time_stages(case, order, config, q, k, v, 1) == dict.fromkeys(attention.STAGES, 2.0)
    assert seen == called
    assert [heads for stage, heads in called if stage == "attend"] == [4, 3]


def test_the_crossover_is_written_as_data() -> None:
    family = crossover.FAMILIES["wan2.1_1.3b"]
    timings = [Timing(8000, 1.0, 1.5, 0.4), Timing(10000, 2.0, 1.5, 0.3)]
    *lengths, end = crossover.records_of("wan2.1_1.3b", family, "preset", timings)
    assert [record["density"] for record in lengths] == [0.4, 0.3]
    assert end["crossover"] == 9300 and end["min_tokens"] == 10000
    never = crossover.records_of("wan2.1_1.3b", family, "preset", timings[:1])[-1]
    assert never["crossover"] is never["min_tokens"] is None


def test_every_family_with_presets_has_a_crossover() -> None:
    assert set(crossover.FAMILIES) == {path.stem for path in PRESETS.glob("*.yaml")}
    for case in attention.CASES.values():
        family = crossover.FAMILIES[case.family]
        assert (family.heads, family.head_dim) == (case.heads, case.head_dim)
