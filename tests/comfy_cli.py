"""comfy-cli, the registry's own tool, in an environment of its own: what it needs would change the one of the tests.

    python3 tests/comfy_cli.py

installs it.
"""

from __future__ import annotations

import os
import subprocess
import sys
import venv
from pathlib import Path

VERSION = "1.23.0"
ENVIRONMENT = Path(__file__).resolve().parent.parent / ".venv-comfy-cli"
SCRIPTS = ENVIRONMENT / ("Scripts" if os.name == "nt" else "bin")
QUIET = {"DO_NOT_TRACK": "1", "COMFY_NO_TELEMETRY": "1", "COMFY_CLI_NO_REMOTE_REFRESH": "1", "NO_COLOR": "1"}


def main() -> None:
    done = ENVIRONMENT / f".installed-{VERSION}"
    if done.exists():
        return
    print(f"installing comfy-cli {VERSION} for the packaging tests", flush=True)
    venv.create(ENVIRONMENT, with_pip=True)
    pip = [str(SCRIPTS / "python"), "-m", "pip", "--disable-pip-version-check", "install", "--quiet"]
    subprocess.run([*pip, f"comfy-cli=={VERSION}"], check=True)
    done.touch()


def missing_reason() -> str | None:
    """Why comfy-cli cannot run here, or None if it can."""
    if (ENVIRONMENT / f".installed-{VERSION}").exists():
        return None
    return f"there is no comfy-cli {VERSION}; `make install-tests` installs it"


def run_comfy_cli(*arguments: str, folder: Path, home: Path, **environment: str) -> str:
    """Run a comfy-cli command and return what it printed; its packages go into the Python that runs this.

    Args:
        arguments: Behind ``comfy``.
        folder: Folder to run in.
        home: Where it keeps its settings.
        environment: Further variables.

    Raises:
        AssertionError: the command failed; with its output.
    """
    variables = {**os.environ, **QUIET, "HOME": str(home), "USERPROFILE": str(home), "VIRTUAL_ENV": sys.prefix}
    done = subprocess.run(
        [str(SCRIPTS / "comfy"), "--skip-prompt", *arguments],
        cwd=folder,
        env=variables | environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


if __name__ == "__main__":
    main()
