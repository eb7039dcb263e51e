"""Faults put into psa_core on purpose: each has to be found by the test named with it.

``python tests/mutants.py`` tries all of them, each in a copy of the pack, and writes benchmarks/results/mutants.json.
"""

from __future__ import annotations

import json
import shlex
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "mutants.json"

FIRST_FAILURE = """
from hypothesis import Phase
settings.register_profile("first", parent=settings.get_profile("pack"), phases=[Phase.generate])
settings.load_profile("first")
"""


@dataclass(frozen=True)
class Mutant:
    """One fault.

    Args:
        file: File in ``psa_core``.
        before: Text that stands there exactly once.
        after: What stands there instead.
        test: Test that fails then, as pytest is given it.
    """

    file: str
    before: str
    after: str
    test: str


LOOPS = "test_reference.py::test_attention_is_the_loops"
PROPERTY = "test_properties.py::test_attention_is_the_loops"
DEFINITION = "test_properties.py::test_importance_and_levels_are_the_definitions"
CAPS = "test_reference.py::test_no_block_is_pooled_further_than_its_keys_resemble_each_other"
DENSE = "test_reference.py::test_weight_zero_is_dense"
TEXT = "test_reference.py::test_more_weight_or_exactness_never_costs_what_it_should_not"
DENSITY = "test_reference.py::test_density_counts_rows_times_groups"
CURVES = "test_orders.py::test_every_curve_visits_every_token_once"
BLOCKS = "test_orders.py::test_blocks_hold_every_token_once_and_never_both_kinds"
ARGUMENTS = "test_attention_arguments.py"
PRESETS = "test_presets.py"
SCHEDULE = "test_schedule.py"

REFERENCE, LEVELS, ORDERING = "backends/reference.py", "levels.py", "ordering.py"

MUTANTS = [
    # lost or wrong logarithms and second-order terms
    Mutant(REFERENCE, "counts.to(level_bias.dtype).log() + level_bias", "level_bias", LOOPS),
    Mutant(REFERENCE, "counts.to(level_bias.dtype).log() +", "counts.to(level_bias.dtype).log2() +", LOOPS),
    Mutant(REFERENCE, "level.group_size == 1 or not", "level.group_size == 2 or not", LOOPS),
    Mutant(REFERENCE, "or not prepared.config.variance_term", "", PROPERTY),
    Mutant(REFERENCE, "bias_from_variance(variance, BLOCK_BIAS_CLAMP)", "bias_from_variance(variance, 1.0)", DEFINITION),
    Mutant("importance.py", "logits + key_counts.to(logits.dtype).log() + bias", "logits + bias", DEFINITION),
    Mutant("importance.py", ".log() + bias.unsqueeze(3)", ".log()", DEFINITION),
    Mutant("importance.py", "LEVEL_BIAS_CLAMP = 1.0", "LEVEL_BIAS_CLAMP = 2.0", PROPERTY),
    Mutant("importance.py", "(variance / 2)", "variance", LOOPS),
    Mutant("importance.py", "return scale * scale *", "return scale *", LOOPS),
    # importance
    Mutant("importance.py", "queries[:, :, :, ::stride]", "queries[:, :, :, : (queries.shape[3] + stride - 1) // stride]",
           DEFINITION),
    Mutant("importance.py", "weights.sum(-1)[:, None]", "weights.shape[-1]", DEFINITION),
    Mutant("importance.py", "(mass * weights[..., None]).sum(3)", "mass.sum(3)", DEFINITION),
    # pooling
    Mutant("pooling.py", "return k - k.mean(dim=2, keepdim=True)", "return k - k.mean(dim=3, keepdim=True)", LOOPS),
    Mutant("pooling.py", "groups.sum(4) / counts.clamp(min=1)[..., None].to(x.dtype)", "groups.mean(4)", LOOPS),
    Mutant("pooling.py", ") * filled[..., None]", ")", LOOPS),
    Mutant("pooling.py", "key_variance=key_spread / tokens[:, None]", "key_variance=key_spread / table.size", LOOPS),
    Mutant("pooling.py", "value_spread.sum(-1) / tokens", "value_spread.sum(-1)", DEFINITION),
    Mutant("pooling.py", "(tokens >= 0)[:, None]", "(tokens > 0)[:, None]", DENSE),
    # wrong levels
    Mutant(LEVELS, "(score < best)", "(score <= best)", "test_reference.py::test_ties_go_to_the_finer_level"),
    Mutant(LEVELS, "value_variances[index].unsqueeze(2)", "value_variances[0].unsqueeze(2)", DEFINITION),
    Mutant(LEVELS, "importance.square() *", "importance *", DEFINITION),
    Mutant(LEVELS, "(key_counts + size - 1) // size", "key_counts // size", DEFINITION),
    Mutant(LEVELS, "error = error / value_power[:, :, None, None]", "pass", DEFINITION),
    Mutant(LEVELS, "config.error_weight / max(len(key_counts), 1)", "config.error_weight", DEFINITION),
    Mutant(LEVELS, "best = torch.where(better, score, best)", "pass", DEFINITION),
    Mutant(LEVELS, "mass_up_to[..., :-1], (1, 0)", "mass_up_to[..., 1:], (0, 1)",
           "test_reference.py::test_threshold_looks_at_the_mass_before_a_block"),
    Mutant(LEVELS, "descending=True", "descending=False", DEFINITION),
    Mutant(LEVELS, "right=True", "right=False", "test_reference.py::test_topk_counts_are_exact_under_ties"),
    Mutant(LEVELS, "torch.empty_like(ranked).scatter_(-1, blocks, ranked)", "ranked", DEFINITION),
    Mutant(LEVELS, "ordered / ordered.sum(-1, keepdim=True)", "ordered", DEFINITION),
    Mutant(LEVELS, "> least, code", ">= 0, code", CAPS),
    Mutant(LEVELS, "torch.where(codes == SKIP_CODE, codes, torch.minimum", "torch.where(codes < 0, codes, torch.minimum", CAPS),
    Mutant(LEVELS, "(counts - 1).clamp(min=0)", "(counts - 2).clamp(min=0)", CAPS),
    Mutant(LEVELS, "cosines.sum(-1) / filled.sum(-1)", "cosines.mean(-1)", CAPS),
    # orders and blocks
    Mutant(ORDERING, "tokens[: len(video)] = video", "tokens[: len(video)] = np.argsort(video)", BLOCKS),
    Mutant(ORDERING, "_curve(grid, config) + start for", "_curve(grid, config) for", TEXT),
    Mutant(ORDERING, "-(-len(part) // size)", "(len(part) // size + 1)", BLOCKS),
    Mutant(ORDERING, "is_exact[start:stop] = True", "is_exact[start : stop - 1] = True", BLOCKS),
    Mutant(ORDERING, "(len(video) - 1) % size + 1", "len(video) % size", "test_kernels.py -k 'just and float32'"),
    Mutant(ORDERING, "self.layout == layout and", "", "test_orders.py::test_an_order_of_another_layout_is_refused"),
    Mutant("curves.py", "return half + 1 if half % 2", "return half + 1 if not half % 2",
           "test_orders.py::test_gilbert_curve_never_jumps_further_than_two"),
    Mutant("curves.py", "np.lexsort((*coordinates[::-1], *keys[::-1]))", "np.argsort(np.lexsort((*coordinates[::-1], *keys[::-1])))",
           "test_orders.py::test_tiles_follow_one_another"),
    Mutant("curves.py", "axes.index(axis)", "axes[axis]", CURVES),
    # the pipeline
    Mutant(REFERENCE, "everything[:, :, :video_rows, :video_keys] = codes", "everything[:, :, :, :video_keys] = codes[:, :, :1]",
           TEXT),
    Mutant(REFERENCE, "/ tokens**2", "/ (tokens * codes.shape[3] * keys.size)", DENSITY),
    Mutant(REFERENCE, "query_squares=queries.square().sum(3) / order.queries.counts.double()[:, None]",
           "query_squares=queries.square().mean(3)", LOOPS),
    Mutant("attention.py", "first += size", "first += size + 1", "test_attention_memory.py::test_where_memory_runs_out_fewer_heads_go_at_a_time"),
    Mutant("schedule.py", "range(first, last + 1)", "range(first, last)", SCHEDULE),
    Mutant("config.py", "if edge != 1:", "if edge > 1:", PRESETS),
]  # fmt: skip

KERNEL_FAULTS = {
    # each makes the Triton backend wrong in its own way
    "an output row goes to its neighbour": Mutant(
        "backends/triton/attend.py",
        "out_ptr + token[:, None] * stride_on",
        "out_ptr + (token[:, None] ^ 1) * stride_on",
        "",
    ),
    "the softmax scale is lost": Mutant("backends/triton/attend.py", "prepared.scale * LOG2E", "LOG2E", ""),
    "the last block's tail counts too much": Mutant(
        "backends/triton/attend.py", "tl.log2(members) + ragged_bias", "tl.log2(members) + ragged_bias + 3", ""
    ),
    "values are not divided by the weights' sum": Mutant(
        "backends/triton/attend.py", "(acc / l_i[:, None])", "(acc / 2)", ""
    ),
    "everything is exact": Mutant(
        "backends/triton/select.py",
        "        codes, bias, indices,",
        "        torch.zeros_like(codes), bias, indices,",
        "",
    ),
}


def copy_with(mutant: Mutant, folder: Path) -> Path:
    """Copy the pack and its tests into a folder and put the fault in.

    Raises:
        ValueError: the text to replace does not stand there exactly once.
    """
    pack = folder / "pack"
    for name in ("psa_core", "presets", "nodes", "tests", "demo"):
        ignored = shutil.ignore_patterns("__pycache__", "out", "weights", ".*")
        shutil.copytree(ROOT / name, pack / name, ignore=ignored)
    for name in ("__init__.py", "pyproject.toml"):
        shutil.copy(ROOT / name, pack / name)
    with (pack / "tests" / "conftest.py").open("a") as conftest:  # any failing case will do, not the smallest
        conftest.write(FIRST_FAILURE)
    path = pack / "psa_core" / mutant.file
    path.write_text(mutated(mutant))
    return pack


def mutated(mutant: Mutant) -> str:
    """The file's text with the fault in it.

    Raises:
        ValueError: the text to replace does not stand there exactly once.
    """
    text = (ROOT / "psa_core" / mutant.file).read_text("utf-8")
    if text.count(mutant.before) != 1:
        raise ValueError(f"{mutant.file}: {mutant.before!r} stands there {text.count(mutant.before)} times, not once")
    return text.replace(mutant.before, mutant.after)


def is_killed(mutant: Mutant) -> bool:
    """Whether the named test fails.

    Raises:
        RuntimeError: it could not be run.
    """
    with TemporaryDirectory() as folder:
        pack = copy_with(mutant, Path(folder))
        command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *shlex.split(mutant.test)]
        done = subprocess.run(command, cwd=pack / "tests", capture_output=True, text=True, timeout=300)
    if done.returncode not in (0, 1):
        raise RuntimeError(
            f"{mutant.test}: pytest ended with {done.returncode}\n{done.stdout[-2000:]}{done.stderr[-500:]}"
        )
    return done.returncode == 1


def fate(mutant: Mutant) -> str:
    """Killed, survived, or why that could not be found out."""
    try:
        return "killed" if is_killed(mutant) else "survived"
    except (RuntimeError, ValueError, subprocess.TimeoutExpired) as error:
        return f"not tried: {error}"


def main() -> int:
    """Try all mutants, two at a time; 1 if one was not killed."""
    began = time.perf_counter()
    with ThreadPoolExecutor(2) as pool:
        fates = list(pool.map(fate, MUTANTS))
    rows = [{**asdict(mutant), "fate": end} for mutant, end in zip(MUTANTS, fates, strict=True)]
    killed, seconds = fates.count("killed"), round(time.perf_counter() - began, 1)
    result = {"mutants": len(rows), "killed": killed, "seconds": seconds, "sample": rows}
    RESULTS.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    for row in rows:
        if row["fate"] != "killed":
            print(f"{row['file']}: {row['before']} -> {row['after']} ({row['test']}): {row['fate']}")
    print(f"{killed} of {len(rows)} mutants killed in {seconds} s")
    return 0 if killed == len(rows) else 1


if __name__ == "__main__":
    sys.exit(main())
