"""Give a file to cosmic-ray: every mutation that it knows, each against the tests that are named.

    pip install 'cosmic-ray>=8.4'
    python scripts/mutants.py src/florana/federation/gate.py tests/test_loop.py tests/test_wire.py

In a copy of the tree; ends with a line per mutation that survived, and the rate of all. The mathematics has mutations
chosen by hand beside this: `scripts/mutate.py`.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import tomli_w

ROOT = Path(__file__).resolve().parent.parent
SECONDS = 300
"""Of one run of the tests; one that takes longer counts as a mutation that was noticed."""


def main() -> None:
    if len(sys.argv) < 3:
        sys.exit("usage: python scripts/mutants.py FILE TEST [TEST ...]")
    file, *tests = sys.argv[1:]
    with tempfile.TemporaryDirectory() as folder:
        for name in ("src", "tests", "recipes", "scripts", "docs", "examples", "benchmarks"):
            shutil.copytree(ROOT / name, Path(folder) / name, ignore=shutil.ignore_patterns("__pycache__"))
        for name in ("pyproject.toml", "README.md"):
            shutil.copy(ROOT / name, folder)
        command = f"{sys.executable} -m pytest -q -x -p no:cacheprovider {' '.join(tests)}"
        config = {"module-path": file, "timeout": SECONDS, "test-command": command, "distributor": {"name": "local"}}
        (Path(folder) / "config.toml").write_text(tomli_w.dumps({"cosmic-ray": config}))
        own = {**os.environ, "PYTHONPATH": str(Path(folder) / "src"), "OMP_NUM_THREADS": "1"}
        program = str(Path(sys.executable).with_name("cosmic-ray"))
        for step in ("init", "exec"):
            subprocess.run([program, step, "config.toml", "session.sqlite"], cwd=folder, env=own, check=True)
        report = Path(sys.executable).with_name("cr-report")
        subprocess.run([str(report), "--surviving-only", "session.sqlite"], cwd=folder, check=True)


if __name__ == "__main__":
    main()
