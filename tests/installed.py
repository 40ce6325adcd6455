"""Packages of others beside ours: installed into a folder of their own, and seen by new processes."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

from tests.documents import ROOT


def install(package: Path, folder: Path) -> Path:
    """Install a package below ``folder`` as its user would; pip builds it where it lies, so from a copy."""
    source = shutil.copytree(package, folder / "source")
    target = folder / "site"
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    # Nothing is fetched: setuptools comes with torch, and muxtune is here already.
    offline = ["--no-index", "--no-deps", "--no-build-isolation"]
    subprocess.run([*pip, *offline, "--target", str(target), str(source)], check=True, timeout=120)
    return target


def run_python(site: Path, *arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    """Run Python in a process that sees ``site`` as a place of packages, in front of this repository."""
    paths = [str(site), str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    return subprocess.run(
        [sys.executable, *arguments],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"},
        cwd=cwd,
        capture_output=True,
        text=True,
        check=False,
        timeout=280,
    )


def run_muxtune(site: Path, *arguments: object, cwd: Path) -> subprocess.CompletedProcess[str]:
    """Run the command line in such a process."""
    program = "import sys; from muxtune.cli.app import main; main(sys.argv[1:])"
    return run_python(site, "-c", program, *map(str, arguments), cwd=cwd)
