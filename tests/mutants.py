"""Faults put into the pack by a tool, which the tests have to find.

    .venv/bin/python tests/mutants.py [--folder nodes --sample 50 --seed 0]    (make mutants)

cosmic-ray's operators say what can be changed: comparisons, arithmetic, numbers, conditions, loops. A seeded sample of these
faults is tried, each in a file of a copy of the pack, so that Triton finds its kernels' source whole. The tests that name the
faulty module come first, then the others of its folder, until one fails. Writes benchmarks/results/mutants.json; a survivor's
``explanation`` there is written by hand and kept. Fails below 95 % killed, or with a survivor that nobody has explained.
"""

from __future__ import annotations

import argparse
import ast
import difflib
import json
import os
import random
import re
import shutil
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from queue import SimpleQueue
from tempfile import TemporaryDirectory

from cosmic_ray.ast import ast_nodes, get_ast
from cosmic_ray.mutating import mutate_code
from cosmic_ray.operators.provider import OperatorProvider

from measure_coverage import CORE_TESTS, NODE_TESTS
from pack import ROOT
from suite import COPY as NEWEST
from suite import ENVIRONMENT, find_newest, install, python

from benchmarks.results_file import checked_out_commit, describe_machine  # isort: skip

RESULTS = ROOT / "benchmarks" / "results" / "mutants.json"
LEAST_SHARE = 0.95
PASSED, FAILED, NOT_COLLECTED = 0, 1, 2  # pytest's exit status

# What is mutated together, and the tests that have to find it.
FOLDERS = {
    "nodes": NODE_TESTS,
    "psa_core": (*CORE_TESTS, "properties"),
    "psa_core/backends/triton": ("kernels", "properties", "attention_memory", "self_check", "concurrency"),
}
# Printed: a fault there shows to the eye or in a measurement, and to no test.
NOT_MUTATED = {
    "nodes/report_picture.py": "where a picture has its parts",
    "psa_core/bench.py": "how time is taken, on a GPU",
}
# Without those that take a name to replace, or that leave no kernel.
OPERATORS = {
    name: operator
    for name in OperatorProvider()
    if not (operator := OperatorProvider()[name]).arguments() and name != "RemoveDecorator"
}


@dataclass(frozen=True)
class Mutant:
    """One fault.

    Args:
        file: File in the pack.
        operator: Name of cosmic-ray's operator that makes it.
        source: The file's text with the fault in it.
        diff: What differs, lines with a minus and a plus before them.
    """

    file: str
    operator: str
    source: str
    diff: str


Place = tuple[str, tuple[int, int]]  # file, line and column


def places(file: str) -> dict[Place, list[tuple[str, int]]]:
    """Where a file can be changed, and by which operators' which occurrence."""
    tree, found = get_ast((ROOT / file).read_text("utf-8")), defaultdict(list)
    for name, operator in OPERATORS.items():
        positions = (start for node in ast_nodes(tree) for start, _ in operator().mutation_positions(node))
        for occurrence, start in enumerate(positions):
            found[file, start].append((name, occurrence))
    return dict(found)


def mutate(file: str, operator: str, occurrence: int) -> Mutant | None:
    """The fault, or None where it is none: it changes annotations alone, or is no Python."""
    source = (ROOT / file).read_text("utf-8")
    try:
        changed = mutate_code(source, OPERATORS[operator](), occurrence)
    except AttributeError:  # cosmic-ray cannot replace exceptions with a dot in their name
        return None
    if changed is None or _without_annotations(changed) in (_without_annotations(source), ""):
        return None
    return Mutant(file, operator, changed, _diff(source, changed))


def _without_annotations(source: str) -> str:
    """A module's code as the interpreter reads it, without annotations; empty where it is no code."""
    try:
        tree = ast.parse(source)
    except SyntaxError:
        return ""
    for node in ast.walk(tree):
        if isinstance(node, ast.arg | ast.AnnAssign):
            node.annotation = ast.Constant(None)
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            node.returns = None
    return ast.dump(tree)


def _diff(before: str, after: str) -> str:
    lines = difflib.unified_diff(before.splitlines(), after.splitlines(), n=0, lineterm="")
    return "\n".join(line for line in lines if not line.startswith(("---", "+++", "@@")))


def draw(folder: str, number: int, seed: int) -> list[Mutant]:
    """A sample of the faults in a folder's own files, one at a place at most."""
    inner = [f"{other}/" for other in FOLDERS if other.startswith(f"{folder}/")]
    files = [path.relative_to(ROOT).as_posix() for path in sorted((ROOT / folder).rglob("*.py"))]
    mine = [file for file in files if file not in NOT_MUTATED and not file.startswith(tuple(inner))]
    everywhere = {place: changes for file in mine for place, changes in places(file).items()}
    chance = random.Random(seed)
    order = chance.sample(sorted(everywhere), len(everywhere))
    drawn = (mutate(file, *chance.choice(everywhere[file, start])) for file, start in order)
    return list(islice(filter(None, drawn), number))


def tests_for(file: str, folder: str) -> list[str]:
    """Test files of a folder, first those that name the module."""
    stem = Path(file).parent.name if file.endswith("__init__.py") else Path(file).stem
    tests = [f"tests/test_{name}.py" for name in FOLDERS[folder]]
    return sorted(tests, key=lambda test: not re.search(rf"\b{stem}\b", (ROOT / test).read_text("utf-8")))


def copy_pack(folder: Path) -> Path:
    """Copy the pack and its tests into a folder."""
    pack = folder / "pack"
    for name in ("psa_core", "presets", "nodes", "tests", "demo", "benchmarks", "locales", "web", "workflows"):
        ignored = shutil.ignore_patterns("__pycache__", "out", ".*")
        shutil.copytree(ROOT / name, pack / name, ignore=ignored)
    for name in ("__init__.py", "pyproject.toml"):
        shutil.copy(ROOT / name, pack / name)
    return pack


@contextmanager
def fault(pack: Path, file: str, source: str) -> Iterator[None]:
    """Put a fault into a copy of the pack, and take it out again."""
    path = pack / file
    before = path.read_bytes()
    path.write_text(source, "utf-8")
    try:
        yield
    finally:
        path.write_bytes(before)


def run_tests(
    pack: Path, interpreter: str, tests: list[str], timeout: float, environment: dict[str, str]
) -> int | None:
    """Pytest's exit status up to the first failure; None where time ran out."""
    chosen = ["-x", "-q", "-p", "no:cacheprovider", "-p", "no:randomly", "-m", "not gpu", "-k", "not torch_compile"]
    try:
        return subprocess.run(
            [interpreter, "-m", "pytest", *chosen, *tests],
            cwd=pack,
            env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"} | environment,
            capture_output=True,
            timeout=timeout,
        ).returncode
    except subprocess.TimeoutExpired:
        return None


def fate(mutant: Mutant, folder: str, run: Callable[[list[str]], int | None]) -> str:
    """What became of a mutant."""
    status = run(tests_for(mutant.file, folder))
    if status is None:
        return "killed by the clock"
    if status in (FAILED, NOT_COLLECTED):
        return "killed"
    return "survived" if status == PASSED else f"not tried: pytest ended with {status}"


def try_folder(
    folder: str, number: int, seed: int, workers: int, interpreter: str, environment: dict[str, str]
) -> dict:
    """Try a sample of a folder's mutants; the record of it.

    Raises:
        RuntimeError: the tests fail without any fault.
    """
    sample = draw(folder, number, seed)
    with TemporaryDirectory() as temporary, ThreadPoolExecutor(workers) as pool:
        packs: SimpleQueue[Path] = SimpleQueue()
        for worker in range(workers):
            packs.put(copy_pack(Path(temporary) / str(worker)))
        began = time.monotonic()
        pack = packs.get()
        if (status := run_tests(pack, interpreter, tests_for("", folder), 3600, environment)) != PASSED:
            raise RuntimeError(f"{folder}: its tests end with {status} without any fault")
        packs.put(pack)
        timeout = 60 + 2 * workers * (time.monotonic() - began)

        def attempt(mutant: Mutant) -> str:
            pack = packs.get()
            try:
                with fault(pack, mutant.file, mutant.source):
                    return fate(mutant, folder, lambda tests: run_tests(pack, interpreter, tests, timeout, environment))
            finally:
                packs.put(pack)

        ends = []
        for mutant, end in zip(sample, pool.map(attempt, sample), strict=True):
            print(f"{end}: {mutant.file}, {mutant.operator}\n{mutant.diff}", flush=True)
            ends.append(end)
    killed = sum(end.startswith("killed") for end in ends)
    rows = [
        {"file": mutant.file, "operator": mutant.operator, "diff": mutant.diff, "fate": end}
        for mutant, end in zip(sample, ends, strict=True)
    ]
    counts = {"tried": len(sample), "killed": killed, "share": round(killed / len(sample), 3)}
    return {"folder": folder, **counts, "seconds": round(time.monotonic() - began), "mutants": rows}


def explain(records: list[dict], before: Path) -> int:
    """Give survivors the explanations that they had; how many have none."""
    known = {}
    if before.exists():
        for record in json.loads(before.read_text("utf-8")).get("records", []):
            known |= {(row["file"], row["diff"]): row.get("explanation", "") for row in record["mutants"]}
    survivors = [row for record in records for row in record["mutants"] if not row["fate"].startswith("killed")]
    for row in survivors:
        row["explanation"] = known.get((row["file"], row["diff"]), "")
    return sum(not row["explanation"] for row in survivors)


def main() -> int:
    """Try the samples and write the file; 1 if too many survive, or one that nobody has explained."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", choices=FOLDERS, action="append", help="these only, and write no file")
    parser.add_argument("--sample", type=int, default=50, help="mutants of each folder")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1)
    args = parser.parse_args()
    interpreter, environment = sys.executable, {}
    if (newest := find_newest()) is not None:  # it has all the models that nodes know
        install(newest)
        interpreter, environment = python(ENVIRONMENT), {"COMFYUI_PATH": str(NEWEST)}
    machine = describe_machine(checked_out_commit())
    records = [
        try_folder(folder, args.sample, args.seed, args.workers, interpreter, environment)
        for folder in args.folder or FOLDERS
    ]
    unexplained = explain(records, RESULTS)
    if not args.folder:
        result = machine | {"seed": args.seed, "records": records}
        RESULTS.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    for file, reason in NOT_MUTATED.items():
        print(f"not tried: {file} ({reason})")
    for record in records:
        print(f"{record['folder']}: {record['killed']} of {record['tried']} killed")
    print(f"survivors that nobody has explained: {unexplained}")
    return 1 if unexplained or min(record["share"] for record in records) < LEAST_SHARE else 0


if __name__ == "__main__":
    sys.exit(main())
