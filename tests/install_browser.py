"""Install the browser that the frontend tests drive, on Debian and its kin as root; elsewhere say what is missing.

python3 tests/install_browser.py
"""

from __future__ import annotations

import os
import shutil
import subprocess

EXECUTABLES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
DEBIAN_PACKAGES = ("chromium", "fonts-dejavu-core")


def main() -> None:
    if not (missing := missing_packages()):
        return
    if not shutil.which("apt-get") or os.geteuid() != 0:
        print(f"The frontend tests will be skipped: {missing_reason()}")
        return
    print("installing a browser for the frontend tests", flush=True)
    environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    for command in (["update"], ["install", "--yes", "--no-install-recommends", *missing]):
        if subprocess.run(["apt-get", "-qq", *command], env=environment, stdout=subprocess.DEVNULL).returncode:
            print(f"apt-get {command[0]} failed, so the frontend tests will be skipped: {missing_reason()}")
            return


def find_browser() -> str | None:
    """Path of a Chromium or Chrome, if there is one."""
    return next(filter(None, map(shutil.which, EXECUTABLES)), None)


def missing_packages() -> tuple[str, ...]:
    """Debian packages that the frontend tests lack; a Chrome from elsewhere serves as well."""
    return () if find_browser() else DEBIAN_PACKAGES


def missing_reason() -> str:
    """Why there is no browser, and what would bring one."""
    return f"there is no Chromium; as root: apt-get install --no-install-recommends {' '.join(missing_packages())}"


if __name__ == "__main__":
    main()
