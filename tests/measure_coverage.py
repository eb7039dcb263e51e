"""Lines of psa_core and nodes that the tests reach: ``python tests/measure_coverage.py`` (make coverage).

Writes benchmarks/results/coverage.json, and fails where less than 95 % of a part is reached. Without
psa_core/backends/triton, whose kernels are not Python's to run.
What only another process or device runs counts as missed: a ComfyUI server, the bench command, a GPU.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory

ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT))

from benchmarks.results_file import checked_out_commit  # noqa: E402
from pack import comfyui_version  # noqa: E402

RESULTS = ROOT / "benchmarks" / "results" / "coverage.json"
CORE_TESTS = (
    "attention_arguments", "attention_memory", "bench", "official_presets", "orders", "presets", "reference",
    "schedule",
)  # fmt: skip
NODE_TESTS = (
    "compare", "concurrency", "faults", "load_cogvideox", "nodes_cogvideox", "nodes_models", "nodes_override",
    "nodes_patch", "nodes_runs", "nodes_schema", "preset_node", "quality_probe", "report", "status", "supply_chain",
)  # fmt: skip
LEAST_PERCENT = 95
OMITTED = "psa_core/backends/triton/*"


def main() -> int:
    """Run the tests under coverage and write the file; 1 if a test failed or too few lines were reached."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("comfyui", type=Path, nargs="*", help="several versions count together; default: COMFYUI_PATH")
    trees = parser.parse_args().comfyui or [Path(os.environ["COMFYUI_PATH"])]
    commit = checked_out_commit()
    with TemporaryDirectory() as folder:
        data, report = Path(folder) / "data", Path(folder) / "report.json"
        passed = [run_tests(data, CORE_TESTS, trees[0]), *(run_tests(data, NODE_TESTS, tree) for tree in trees)]
        if not all(passed):
            return 1
        command = [sys.executable, "-m", "coverage", "json", f"--data-file={data}", "-o", report, "-q"]
        subprocess.run(command, cwd=ROOT, check=True)
        measured = json.loads(report.read_text("utf-8"))
    totals = {}
    for part in ("psa_core", "nodes"):
        summaries = [
            entry["summary"] for name, entry in measured["files"].items() if name.startswith(f"{part}{os.sep}")
        ]
        lines, covered = (sum(summary[key] for summary in summaries) for key in ("num_statements", "covered_lines"))
        totals[part] = {"lines": lines, "covered": covered, "percent": round(100 * covered / lines, 2)}
    missed = {name: entry["missing_lines"] for name, entry in measured["files"].items() if entry["missing_lines"]}
    versions = {name: version(name) for name in ("coverage", "pytest", "torch")} | {"python": sys.version.split()[0]}
    versions |= {"comfyui": ", ".join(map(comfyui_version, trees))}
    result = {"commit": commit, "versions": versions, "omitted": OMITTED, "tests": [*CORE_TESTS, *NODE_TESTS]}
    result |= {"totals": totals, "missed_lines": missed}
    RESULTS.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(totals))
    return 1 if min(part["percent"] for part in totals.values()) < LEAST_PERCENT else 0


def run_tests(data: Path, tests: tuple[str, ...], comfyui: Path) -> bool:
    """Add what some tests reach with one ComfyUI; whether they passed."""
    command = [
        "-m",
        "coverage",
        "run",
        "--append",
        "--source=psa_core,nodes",
        f"--omit={OMITTED}",
        f"--data-file={data}",
    ]
    chosen = ["-m", "not gpu and not interpreter", "-k", "not torch_compile", "-p", "no:cacheprovider"]
    files = [f"tests/test_{name}.py" for name in tests]
    # one thread: the tensors are small, and threads that wait for each other cost more than they do
    environment = os.environ | {"COMFYUI_PATH": str(comfyui), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, *command, "-m", "pytest", *chosen, *files], cwd=ROOT, env=environment)
    return done.returncode == 0


if __name__ == "__main__":
    sys.exit(main())
