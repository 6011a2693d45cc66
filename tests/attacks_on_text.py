"""Clients that train on turned labels, on docstring topics with the demo's encoder: what is left of the accuracy.

python -m tests.attacks_on_text [--strategies fedit best-rank] [--seeds 1]
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from torch import Tensor

from florana.errors import FloranaError
from florana.federation.local_engine import LocalEngine
from florana.federation.messages import Brief, Reply, pack, unpack
from florana.lora.factors import adapter_from_tensors
from florana.recipe.load import check, read_recipe
from florana.runs.chosen_strategy import strategy_of
from florana.runs.prepared import prepare
from florana.runs.rounds import execute_rounds
from florana.runs.setup import begin, clients_of, federation_of
from florana.train.data.tokenize import Example
from tests.attacks import rule_of
from tests.conftest import ROOT

CLIENTS, ROUNDS, TOPICS = 10, 6, 10


def accuracy(rule: str, hostile: int, factor: float, out: Path, strategy: str = "fedit", seed: int = 0) -> float:
    """The global model's accuracy after the last round.

    Args:
        hostile: how many of ten train on labels turned by one, in every round. factor: of their update; 0: they are
            away. out: a new run folder.
    """
    table = read_recipe(ROOT / "recipes" / "study-findings.toml").model_dump(exclude_none=True)
    table.pop("study")
    table |= {
        "seed": seed,
        "strategy": {"name": strategy},
        "partition": {"kind": "dirichlet", "clients": CLIENTS, "alpha": 0.5, "smallest": 20},
        "federation": {"rounds": ROUNDS, "min_clients": 7},
        "evaluate": {"every": ROUNDS, "personal": "never"},
        "robust": rule_of(rule, max(1, hostile)).model_dump(exclude_none=True),
    }
    recipe = check(table, "attacks")
    setup = prepare(recipe)
    bad = sorted(setup.clients)[CLIENTS - hostile :]

    def turn(rows: Sequence[Example]) -> tuple[Example, ...]:
        return tuple(replace(row, labels=((int(row.labels[0]) + 1) % TOPICS,)) for row in rows)

    turned = {
        name: replace(data, train=turn(data.train), bins=turn(data.bins)) if name in bad else data
        for name, data in setup.clients.items()
    }
    setup = replace(setup, clients=turned)
    method = strategy_of(recipe, sorted(setup.clients))
    begun = method.init(begin(recipe, setup, method))
    clients = clients_of(recipe, setup, begun)

    def fit(brief: Brief, own: Mapping[str, Tensor]) -> tuple[Reply, Mapping[str, Tensor]]:
        if brief.client not in bad:
            return clients.fit(brief, own)
        if factor == 0:
            raise FloranaError("away")
        reply, kept = clients.fit(brief, own)
        before, _ = unpack(brief.payload, clients.first, own, brief.scalings)
        after, _ = unpack(reply.payload, clients.first, own, brief.scalings)
        old = before.tensors()
        far = {n: old[n] + factor * (tensor - old[n]) for n, tensor in after.tensors().items()}
        payload = pack(adapter_from_tensors(far, brief.scalings), brief.returns)
        return replace(reply, payload=payload), kept

    result = execute_rounds(
        recipe,
        out,
        method,
        begun,
        setup.bench.card,
        lambda memories: LocalEngine(fit, memories),
        # a client's program may be of its own: what training can reach is left out of the question
        replace(federation_of(recipe, setup, sorted(setup.clients), setup.examples), reach=None),
        dict,
    )
    return float(result.records[-1].eval["global"]["accuracy"])
