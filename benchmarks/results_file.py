"""The JSON that a benchmark writes: ``{device, versions, commit, records}``, saved after every record."""

from __future__ import annotations

import json
import platform
import re
import subprocess
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"

Record = dict[str, Any]


@dataclass
class ResultFile:
    """Records of one kind of benchmark on one machine.

    A record takes the place of one with the same key. One that says why something ``failed`` takes no measurement's
    place; without the last part of its key it stands for all of them, and goes when one of them has been measured.

    Args:
        path: Where the file is.
        machine: What :func:`describe_machine` says.
        key: Names of the entries that tell records apart, the finest one last.
        records: What has been measured.
    """

    path: Path
    machine: dict[str, Any]
    key: tuple[str, ...]
    records: list[Record] = field(default_factory=list)

    @staticmethod
    def open(path: Path, machine: dict[str, Any], key: tuple[str, ...]) -> ResultFile:
        """Go on with the file at ``path`` if it belongs to the same device, versions and commit, else start afresh."""
        file = ResultFile(path, machine, key)
        if not path.exists():
            return file
        before = json.loads(path.read_text(encoding="utf-8"))
        records = before.pop("records")
        differing = [name for name in machine if before.get(name) != machine[name]]
        if differing:
            said = "; ".join(f"{name}: {before.get(name)!r} there, {machine[name]!r} here" for name in differing)
            print(f"{path} is of another machine or commit and is replaced ({said})", flush=True)
            return file
        file.records = records
        print(f"{path} holds {len(records)} records of this machine and commit, which are kept", flush=True)
        return file

    def add(self, record: Record) -> None:
        """Put a record in its place and save the file."""
        place = self._place(record)
        everything = (*place[:-1], "")
        if "failed" in record:
            measured = [self._place(old) for old in self.records if "failed" not in old]
            if place in measured or (place == everything and any(old[:-1] == place[:-1] for old in measured)):
                return
        self.records = [
            old
            for old in self.records
            if self._place(old) != place and not ("failed" in old and self._place(old) == everything)
        ]
        self.records.append(record)
        self.save()

    def save(self) -> None:
        """Write the file, all of it or nothing."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        part = self.path.with_suffix(".part")
        part.write_text(json.dumps(self.machine | {"records": self.records}, indent=1) + "\n", encoding="utf-8")
        part.replace(self.path)

    def _place(self, record: Record) -> tuple[Any, ...]:
        return tuple(record.get(name) for name in self.key)


def describe_machine(commit: str) -> dict[str, Any]:
    """Device, versions and commit that the records belong to."""
    versions = {"torch": torch.__version__, "triton": installed("triton"), "python": platform.python_version()}
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    return {"device": device, "versions": versions, "commit": commit}


def device_slug() -> str:
    """The device's name as a part of a file's name."""
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def installed(package: str) -> str:
    """Version of an installed package; empty where there is none."""
    try:
        return version(package)
    except PackageNotFoundError:
        return ""


def checked_out_commit(repository: Path = ROOT) -> str:
    """A repository's commit, with a plus if files differ from it; empty where git does not know."""

    def git(*arguments: str) -> str:
        try:
            run = subprocess.run(["git", "-C", repository, *arguments], capture_output=True, text=True)
        except FileNotFoundError:
            return ""
        return run.stdout.strip() if run.returncode == 0 else ""

    commit = git("rev-parse", "--verify", "HEAD")
    return commit + ("+" if commit and git("status", "--porcelain", "--untracked-files=no") else "")
