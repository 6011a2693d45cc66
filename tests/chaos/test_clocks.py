"""Clocks that are off by ten minutes, an hour and two days, at either end: real programs under libfaketime."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("flwr", reason="the extra 'flower' is not installed")

from tests.chaos.counts import Tally
from tests.deployment import PROGRAM, Fed, environment, federation, listens
from tests.program import HANGS, wait_for

LIBRARY = str(next(Path("/usr/lib").glob("*/faketime/libfaketimeMT.so.1"), ""))
pytestmark = [
    pytest.mark.chaos,
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning"),
    pytest.mark.skipif(not LIBRARY, reason="libfaketime is not installed"),
]
OFF = {"+10m": 600, "-10m": -600, "+1h": 3600, "-1h": -3600, "+2d": 172_800, "-2d": -172_800}


def by_clock(fed: Fed, off: str) -> dict[str, str]:
    """What a program runs with whose clock is off."""
    own = environment(fed.home)
    return own | ({"LD_PRELOAD": LIBRARY, "FAKETIME": off} if off else {})


def program(fed: Fed, off: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*PROGRAM, *arguments],
        env=by_clock(fed, off),
        capture_output=True,
        text=True,
        timeout=HANGS,
        check=False,
        cwd=fed.folder,
    )


@contextmanager
def serving(fed: Fed, off: str) -> Iterator[subprocess.Popen[bytes]]:
    fed.out = fed.folder / f"run-{len(list(fed.folder.glob('run-*')))}"
    with (fed.folder / "serve.log").open("wb") as log:
        command = [*PROGRAM, *fed.serving("--wait", str(HANGS), "--deadline", str(HANGS), "--no-base")]
        server = subprocess.Popen(command, env=by_clock(fed, off), stdout=log, stderr=log, cwd=fed.folder)
    try:
        assert wait_for(lambda: listens(fed.port) or server.poll() is not None)
        yield server
    finally:
        server.terminate()
        server.wait(HANGS)


def told(site: str, server: str, done: subprocess.CompletedProcess[str], verb: str) -> None:
    """It ends at once with what is wrong, and which way the clock is off."""
    said = " ".join((done.stdout + done.stderr).split())
    assert done.returncode in (3, 4), (verb, site, server, said)
    assert "Traceback" not in said
    difference = OFF.get(site, 0) - OFF.get(server, 0)
    if "does not hold" in said:  # the certificate, which is not valid yet by this clock
        assert difference < 0, said
        assert "by this machine's clock it is" in said
        return
    seconds, way = re.search(r"(\d+) seconds (ahead of|behind) the server's", said).groups()  # type: ignore[union-attr]
    assert abs(int(seconds) - abs(difference)) < 120, said
    assert way == ("ahead of" if difference > 0 else "behind"), said


def test_a_clock_that_is_off_is_named(recipe_table: dict[str, Any], tmp_path: Path, tally: Tally) -> None:
    table = {**recipe_table, "partition": {"kind": "iid", "clients": 2}, "evaluate": {"personal": "never"}}
    table["federation"] = {"rounds": 1, "min_clients": 2}
    cases, names = 0, ["client-0", "client-1"]
    with federation(table, tmp_path, names, join=False) as fed:
        place, site = str(tmp_path / "invitation"), str(tmp_path / "client-0")
        with serving(fed, "") as server:
            for off in OFF:
                for verb in ("join", "doctor"):
                    told(off, "", program(fed, off, verb, place, "--site", site), verb)
                    cases += 1
            assert server.poll() is None
        for off, seconds in OFF.items():
            with serving(fed, off) as server:
                if seconds < 0 and server.poll() is not None:  # its certificate is not valid yet
                    said = " ".join((tmp_path / "serve.log").read_text().split())
                    assert server.returncode == 3, said
                    assert "set the clock right" in said
                    cases += 1
                    continue
                for verb in ("join", "doctor"):
                    told("", off, program(fed, "", verb, place, "--site", site), verb)
                    cases += 1
    tally("clocks off by ten minutes, an hour and two days, at either end", cases, "each named, with what to do")
