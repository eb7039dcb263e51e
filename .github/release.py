"""Decide whether a push releases a version: its number rose, and CHANGELOG.md says what is new.

python .github/release.py COMMIT CHANGES

COMMIT is what the branch was before. Prints ``release=true`` or ``release=false``; writes the version's part of
CHANGELOG.md into the file CHANGES.
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import tomllib


def main(before: str, changes: str) -> None:
    old = subprocess.run(["git", "show", f"{before}:pyproject.toml"], capture_output=True, encoding="utf-8")
    if old.returncode:
        raise SystemExit(f"{before}: has no pyproject.toml to compare with")
    project = tomllib.loads(Path("pyproject.toml").read_text("utf-8"))
    version, previous = version_of(project), version_of(tomllib.loads(old.stdout))
    if version < previous:
        raise SystemExit(f"version: {dotted(version)} is below {dotted(previous)}, which it was before")
    if version > previous:
        if project["tool"]["comfy"]["PublisherId"] == "your-publisher-id":
            raise SystemExit("PublisherId: is not set in pyproject.toml")
        text = changelog_of(dotted(version), Path("CHANGELOG.md").read_text("utf-8"))
        Path(changes).write_text(text, encoding="utf-8")
    print(f"release={str(version > previous).lower()}")


def version_of(project: dict[str, Any]) -> tuple[int, ...]:
    version = project["project"]["version"]
    if not re.fullmatch(r"\d+\.\d+\.\d+", version):
        raise SystemExit(f"version: {version!r} is not three numbers such as 1.2.3")
    return tuple(map(int, version.split(".")))


def dotted(version: tuple[int, ...]) -> str:
    return ".".join(map(str, version))


def changelog_of(version: str, changelog: str) -> str:
    """The part of a changelog under a version's heading."""
    part = re.search(rf"^## {re.escape(version)}\b[^\n]*\n(.*?)(?=^## |\Z)", changelog, re.MULTILINE | re.DOTALL)
    if part is None or not part[1].strip():
        raise SystemExit(f"CHANGELOG.md: has nothing under a heading '## {version}'")
    return part[1].strip() + "\n"


if __name__ == "__main__":
    if len(sys.argv) != 3:
        raise SystemExit(__doc__)
    main(*sys.argv[1:])
