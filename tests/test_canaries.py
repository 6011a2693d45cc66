"""`florana audit`: what updates tell of rows that were or were not among those trained on, as an epsilon at least."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats

from florana.dp.audit_bound import chance, least_epsilon
from florana.recipe.schema import Recipe
from florana.runs.canary_audit import audit
from florana.runs.prepared import prepare
from florana.runs.setup import execute
from florana.train.canaries import Canaries, canaries, explained_by, guessed
from tests.program import florana
from tests.test_private import private


@pytest.mark.parametrize(("guesses", "right"), [(100, 70), (40, 40), (1000, 560)])
def test_without_delta_the_bound_is_clopper_and_pearsons(guesses: int, right: int) -> None:
    q = stats.beta.ppf(0.05, right, guesses - right + 1)
    assert least_epsilon(guesses, right, 2 * guesses, 0.0) == pytest.approx(math.log(q / (1 - q)), abs=1e-6)


def test_the_chance_is_the_theorems() -> None:
    guesses, right, rows, epsilon, delta = 20, 15, 50, 0.7, 1e-3
    q = math.exp(epsilon) / (1 + math.exp(epsilon))
    pmf = [math.comb(guesses, k) * q**k * (1 - q) ** (guesses - k) for k in range(guesses + 1)]
    most = max(sum(pmf[right - i : right]) / i for i in range(1, right + 1))
    assert chance(guesses, right, rows, epsilon, delta) == pytest.approx(sum(pmf[right:]) + 2 * rows * delta * most)
    assert least_epsilon(guesses, right, rows, 1e-3) < least_epsilon(guesses, right, rows, 0.0)


def test_an_honest_mechanism_is_accused_of_no_more_than_it_does() -> None:
    """Randomized response of epsilon = 1, audited 400 times: in at most 5 % of them is more said than the truth."""
    rng, q = np.random.default_rng(0), math.e / (1 + math.e)
    found = [least_epsilon(200, int(rng.binomial(200, q)), 200, 0.0) for _ in range(400)]
    assert np.mean(np.array(found) > 1.0) <= 0.075
    assert np.mean(found) > 0.6, "it must find most of it"


def test_what_moved_is_explained_by_whose_gradients_it_is() -> None:
    draws = torch.Generator().manual_seed(0)
    gradients = torch.randn(30, 200, generator=draws)
    inside = torch.rand(30, generator=draws) < 0.5
    found = explained_by(gradients, (gradients * inside[:, None]).sum(0))
    assert float(found[inside].min()) > float(found[~inside].max())


def test_canaries_are_like_the_rows_and_half_of_them_are_in(recipe_table: dict[str, Any]) -> None:
    rows = prepare(private(recipe_table)).clients["client-0"].train
    own = canaries(rows, 400, 1)
    assert 160 < sum(own.included) < 240
    assert {len(row.ids) for row in own.rows} <= {len(row.ids) for row in rows}
    assert {row.labels for row in own.rows} == {row.labels for row in rows}
    assert [row.ids for row in canaries(rows, 400, 1).rows] == [row.ids for row in own.rows]
    assert guessed([Canaries([], [True, False] * 4, [float(n) for n in range(8)])]) == (4, 2)


def often(table: dict[str, Any], **privacy: Any) -> Recipe:
    """A model in which rows differ, and enough steps that what is in is seen."""
    model = {"base": "package:florana/demo/tiny-encoder", "target_modules": "all-linear", "rank": 8, "alpha": 16}
    train = {"steps": 12, "batch_size": 8, "learning_rate": 0.001}
    plain = {**table, "model": model}
    return private(plain, train=train, federation={"rounds": 3, "clients_per_round": 4}, privacy=privacy)


def test_noise_hides_the_canaries_that_are_found_without_it(recipe_table: dict[str, Any]) -> None:
    loud = often(recipe_table, epsilon=1e15, noise_multiplier=1e-6)
    setup = prepare(loud)
    found = audit(loud, setup, 32)
    assert (found.canaries, found.guesses, found.rounds) == (128, 64, 3)
    assert found.at_least > 0.3, found
    quiet = audit(often(recipe_table, epsilon=1.0), setup, 32)
    assert quiet.spent is not None
    assert quiet.at_least <= quiet.spent <= 1.0
    assert quiet.at_least < found.at_least


def test_the_verb_audits_a_run_and_refuses_one_without_a_budget(recipe_table: dict[str, Any], tmp_path: Path) -> None:
    execute(private(recipe_table), tmp_path / "run")
    before = (tmp_path / "run" / "privacy.jsonl").read_bytes()
    done = florana("audit", str(tmp_path / "run"), "--canaries", "8", "--json")
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert told["canaries"] == 32
    assert told["at_least"] <= told["spent"] <= told["stated"] == 8.0
    assert json.loads((tmp_path / "run" / "audit.json").read_text()) == told
    assert (tmp_path / "run" / "privacy.jsonl").read_bytes() == before
    done = florana("audit", str(tmp_path / "run"), "--canaries", "8", "--set", "privacy.epsilon=4")
    assert "stated 4, spent" in done.stdout
    done = florana("audit", str(tmp_path))
    assert (done.returncode, "is no run folder" in done.stderr) == (2, True)
    budget = ("unit", "epsilon", "delta", "clip", "accountant")
    lines = (tmp_path / "run" / "recipe.toml").read_text().splitlines()
    (tmp_path / "run" / "recipe.toml").write_text("\n".join(line for line in lines if not line.startswith(budget)))
    done = florana("audit", str(tmp_path / "run"))
    assert (done.returncode, "no privacy.unit" in done.stderr) == (2, True)
