"""Secure sums when clients are killed: at each step, up to the threshold and above it; real sites, at any moment."""

from __future__ import annotations

import functools
import json
import random
import subprocess
import time
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("flwr", reason="the extra 'flower' is not installed")

from florana.errors import FederationError
from florana.secure import neighbours
from florana.secure.masks import Numbers
from tests.chaos.counts import Tally, often
from tests.deployment import PROGRAM, environment, federation
from tests.program import wait_for
from tests.secure_cases import STEPS, Session, summed, terms, vectors


@often(2, 20)
def test_clients_killed_at_each_step_of_the_protocol(count: int, tally: Tally) -> None:
    """Every step of both trips, so often, with 3 to 12 clients: the survivors' exact sum, or no sum."""
    rng, whole, none = random.Random(count), 0, 0
    cases = [*((step, 0) for step in STEPS), *((step, 1) for step in STEPS[2:])]
    for number in range(count):
        for step, trip in cases:
            clients = rng.randint(3, 12)
            names, word = [f"site-{n:02}" for n in range(clients)], f"{number}{step}{trip}"
            one = Session(names, terms(2, minimum=2, session=word))
            gone = {step: rng.sample(names, rng.randint(1, clients - 1))}
            left = clients - len(gone[step])
            parts = [vectors(names, 20, rng.randrange(10**6)) for _ in range(2)]
            least = neighbours.threshold(left if step == "keys" else clients)
            if left < max(least, 2):
                none += 1
                with pytest.raises(FederationError):
                    summed_up(one, parts, step, trip, gone)
                continue
            whole += 1
            for at, (total, survivors) in enumerate(summed_up(one, parts, step, trip, gone)):
                assert np.array_equal(total, summed(parts[at], survivors)), (step, trip, number)
                assert set(survivors) >= set(names) - set(gone[step])
    what = "clients killed at each step of a secure sum"
    tally(what, whole + none, f"{whole} survivors' exact sums, {none} above the threshold: no sum")


def summed_up(
    one: Session, parts: Sequence[Mapping[str, Numbers]], step: str, trip: int, gone: Mapping[str, Collection[str]]
) -> list[tuple[Numbers, list[str]]]:
    """Both sums, the clients leaving at a step of one of them."""
    one.begin(gone)
    assert step in STEPS
    return [one.trip(at, parts[at], gone if at == trip else {}) for at in range(2)]


def has(path: Path, word: str) -> bool:
    return path.exists() and word in path.read_text()


@pytest.mark.chaos
def test_sites_killed_within_secure_rounds(recipe_table: dict[str, Any], tmp_path: Path, tally: Tally) -> None:
    """One of four sites, by SIGKILL at a random moment of four rounds: the others go on, and the run ends."""
    names, rng, kills, middle = [f"client-{n}" for n in range(4)], random.Random(0), 5, 0
    table = {
        **recipe_table,
        "partition": {"kind": "iid", "clients": 4},
        "federation": {"rounds": 4, "min_clients": 3},
        "strategy": {"name": "best-rank", "source": "sums"},
        "privacy": {"secure_aggregation": True, "max_rows": 500},
        "evaluate": {"personal": "never"},
    }
    for number in range(kills):
        folder = tmp_path / str(number)
        folder.mkdir()
        with federation(table, folder, names, join=False) as fed:
            for name in names:
                fed.join(name)
            command = [*PROGRAM, *fed.serving("--deadline", "10")]
            with (folder / "serve.log").open("wb") as log:
                server = subprocess.Popen(command, env=environment(fed.home), stdout=log, stderr=log, cwd=folder)
            assert wait_for(functools.partial(has, fed.out / "progress.jsonl", '"kind": "round"'), 120)
            time.sleep(rng.random() * 2)
            victim = rng.choice(names)
            fed.sites[victim].kill()
            assert server.wait(300) == 0, (folder / "serve.log").read_text()
            records = [json.loads(line) for line in (fed.out / "rounds.jsonl").read_text().splitlines()]
            assert len(records) == 4
            assert "Traceback" not in (folder / "serve.log").read_text()
            middle += any(victim in record["refused"] for record in records)
    tally("SIGKILL of a site within secure rounds", kills, f"all rounds done, {middle} runs went on without it")
