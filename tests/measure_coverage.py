"""Lines of psa_core and nodes that the tests reach: ``python tests/measure_coverage.py`` (make coverage).

Writes benchmarks/results/coverage.json. Without psa_core/backends/triton, whose kernels are not Python's to run.
What only another process or device runs counts as missed: a ComfyUI server, the bench command, a GPU.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "coverage.json"
TESTS = (
    "attention_arguments", "attention_memory", "bench", "concurrency", "faults", "load_cogvideox", "nodes_cogvideox",
    "nodes_models", "nodes_override", "nodes_patch", "nodes_schema", "official_presets", "orders", "preset_node",
    "presets", "reference", "schedule", "supply_chain",
)  # fmt: skip
OMITTED = "psa_core/backends/triton/*"


def main() -> int:
    """Run the tests under coverage and write the file; pytest's exit status."""
    sys.path.insert(0, str(ROOT))
    from benchmarks.results_file import checked_out_commit

    commit = checked_out_commit()
    with TemporaryDirectory() as folder:
        data, report = Path(folder) / "data", Path(folder) / "report.json"
        coverage = [sys.executable, "-m", "coverage"]
        command = ["run", "--source=psa_core,nodes", f"--omit={OMITTED}", f"--data-file={data}", "-m", "pytest"]
        chosen = ["-m", "not gpu and not interpreter", "-k", "not torch_compile", "-p", "no:cacheprovider"]
        files = [f"tests/test_{name}.py" for name in TESTS]
        # one thread: the tensors are small, and threads that wait for each other cost more than they do
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        done = subprocess.run([*coverage, *command, *chosen, *files], cwd=ROOT, env=environment)
        if done.returncode:
            return done.returncode
        subprocess.run([*coverage, "json", f"--data-file={data}", "-o", report, "-q"], cwd=ROOT, check=True)
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
    result = {"commit": commit, "versions": versions, "omitted": OMITTED, "tests": list(TESTS)}
    result |= {"totals": totals, "missed_lines": missed}
    RESULTS.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(totals))
    return 0


if __name__ == "__main__":
    sys.exit(main())
