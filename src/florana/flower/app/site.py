"""What a site answers: who it is, and a round of training. The same at a site of a federation and in a simulation."""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from florana.displayable import log
from florana.errors import BudgetSpent, FloranaError, RecipeError
from florana.federation.client_state import keep, recall
from florana.federation.local_engine import Fit
from florana.federation.messages import pack
from florana.federation.quantize import Format
from florana.federation.sealed_client import SealedClient
from florana.flower.app.codec import failure_frame, read_brief, reply_frame, sealed_frame, step_in
from florana.flower.app.frames import Frame
from florana.flower.app.sealed_site import sealed_at
from florana.flower.app.site_card import Card, Common, Holds, digest
from florana.lora.factors import Adapter
from florana.recipe import schema as r
from florana.runs.chosen_strategy import strategy_of
from florana.runs.prepared import Setup
from florana.runs.private_runs import mechanisms, private_site
from florana.runs.setup import clients_of, first_state
from florana.runs.threads import instructions, threads
from florana.secure.identities import Signer
from florana.strategy.base import State, Strategy, Work

PLACES = {
    "model": {"base", "device"},
    "data": {
        "train",
        "test",
        "test_mismatched",
        "test_split",
        "test_limit",
        "hub_config",
        "validation",
        "validation_split",
    },
}
"""Keys of the recipe that may differ between the sites: where things are, not what they are."""


@dataclass(frozen=True, eq=False)
class Site:
    """One client at its own machine, or every client of a simulation.

    Args:
        who: the name that the node's own configuration gives it.
        fit: a client's round, as the local engine calls it.
        card: what `hello` says of the site.
        start: the adapter before the first round, head included.
        folder: where the client state is kept.
        uplink: how the site's own recipe says that updates are written.
        sealed: its part in secure sums, where its own recipe has them: it then sends nothing of an update but there.
        spent: epsilon of all that was released of its rows, where its own recipe has a budget.
        charged: the kind of frame with which something is released.
        rounds: how many a run has by the site's own recipe; 0 for any number.
        own: what a client trains and sends by the site's own recipe, in any round; None for whatever is asked.
        measures: whether it measures its own model, by its own recipe.
    """

    who: str
    fit: Fit
    card: Card
    start: Adapter
    folder: Path
    uplink: Format = "float32"
    sealed: SealedClient | None = None
    spent: Callable[[], float] | None = None
    charged: str = "train"
    rounds: int = 0
    own: Work | None = None
    measures: bool = True

    def answer(self, frame: Frame) -> Frame:
        """The reply to one frame of the server. What goes wrong becomes a `failure` with its reason."""
        try:
            if frame.kind == "hello":
                start = pack(self.start) if frame.fields.get("start") else b""
                return Frame("hello", self.card.model_dump(mode="json"), start)
            if frame.kind == "sealed":
                return self._sealed(frame)
            if frame.kind != "train":
                return failure_frame(f"does not know requests of kind '{frame.kind[:40]}'")
            return self._train(frame)
        except FloranaError as error:
            return failure_frame(str(error).replace("\n", "; "), isinstance(error, BudgetSpent))
        except Exception as error:
            log.exception("client %s failed", self.who)
            return failure_frame(f"{type(error).__name__}: {error}".splitlines()[0])

    def _train(self, frame: Frame) -> Frame:
        brief, run = read_brief(frame), str(frame.fields["run"])
        if brief.client != self.who:
            return failure_frame(f"is '{self.who}', but was asked as '{brief.client[:80]}'")
        if frame.fields.get("card") != digest(self.card):  # it was started anew since, with something else
            return Frame("changed")
        if self.rounds and not 1 <= brief.round <= self.rounds:
            return failure_frame(f"is asked for round {brief.round}; by its own recipe a run has {self.rounds}")
        if brief.sealed != (self.sealed is not None):
            asked, own = ("sealed", "open") if brief.sealed else ("open", "sealed")
            return failure_frame(f"is asked for an update that is {asked}; by its own recipe they are {own}")
        if brief.uplink != self.uplink or (self.uplink == "float32" and brief.feedback):
            return failure_frame(f"is asked to answer in {brief.uplink[:20]}; its own recipe says {self.uplink}")
        if beyond := self._beyond(brief.trains, brief.returns):
            return failure_frame(f"is asked for {beyond}, which by its own recipe it does not train, or does not send")
        if brief.evaluate and not self.measures:
            return failure_frame("is asked for the scores of its own model; by its own recipe it measures none")
        # a later trip of a round is asked of what was kept in its first
        memory = recall(self.folder, run, self.who, brief.round + (1 if brief.trip else 0))
        with threads(self.card.threads):  # in whatever thread Flower asks
            reply, kept = self.fit(brief, memory)
        keep(self.folder, run, self.who, brief.round, kept)
        return reply_frame(reply, str(frame.fields["nonce"]))

    def _beyond(self, trains: Collection[str], returns: Collection[str]) -> str:
        """The kinds of tensors that are asked for beyond the site's own recipe, in words; empty where none is."""
        if self.own is None:
            return ""
        kinds = {*trains} - self.own.trains | {*returns} - self.own.up
        return ", ".join(sorted(str(kind)[:20] for kind in kinds))

    def _sealed(self, frame: Frame) -> Frame:
        if self.sealed is None:
            return failure_frame("is asked for a secure sum; its own recipe has none")
        if frame.fields.get("card") != digest(self.card):
            return Frame("changed")
        asked = step_in(frame)
        if beyond := self._beyond([], asked.head.get("returns", [])):
            return failure_frame(f"is asked for a sum of {beyond}, which by its own recipe it does not send")
        step = self.sealed.answer(asked, lambda run, round_: recall(self.folder, run, self.who, round_ + 1))
        return sealed_frame(step, str(frame.fields.get("run")), str(frame.fields["nonce"]))


def site_of(
    recipe: r.Recipe,
    setup: Setup,
    who: str,
    folder: Path,
    step: Callable[[str], None] | None = None,
    counts: bool = True,
    signer: Signer | None = None,
) -> Site:
    """The site of one client of a set-up.

    Args:
        recipe: as the site reads it.
        setup: the model, and the rows of this client at least.
        who: its name.
        folder: where the client state is kept.
        step: told of every optimizer step.
        counts: whether it says how many rows of each class it has.
        signer: its signatures, and those of the others that it knows: for secure sums.

    Raises:
        RecipeError: the set-up has no such client, or the strategy starts from all clients' gradients.
    """
    if who not in setup.clients:
        raise RecipeError(f"there is no client '{who}'", why=f"the data have {', '.join(sorted(setup.clients))}")
    with threads(recipe.threads):
        strategy = strategy_of(recipe, sorted(setup.clients))
        begun = first_state(recipe, setup, starts_anywhere(strategy))
        clients = clients_of(recipe, setup, begun, step or (lambda client: None))
        spends = mechanisms(recipe, {who: len(setup.clients[who].train)})
        private = private_site(recipe, clients, spends, folder) if spends else None
        card = card_of(recipe, setup, who, clients.first)
        if not counts or private is not None:  # how many of each class is a figure of the rows without noise
            card = card.model_copy(update={"holds": card.holds.model_copy(update={"per_label": None})})
        sealed = sealed_at(recipe, signer, len(setup.clients[who].train), folder)
        if sealed is not None:  # not even its rows are told
            card = card.model_copy(update={"holds": Holds(train=None, test=0)})
        rounds = recipe.federation.rounds
        fit = clients.fit if private is None else private.fit
        spent: Callable[[], float] | None = None if private is None else functools.partial(private.spent, who)
        charged = "train"
        if sealed is not None and sealed.hiding is not None:
            spent, charged = sealed.hiding.spent, "sealed"
        return Site(
            who, fit, card, clients.first, folder, recipe.federation.uplink, sealed, spent, charged, rounds,
            work_of(strategy, begun, who), recipe.evaluate.personal != "never",
        )  # fmt: skip


def work_of(strategy: Strategy, begun: State, who: str) -> Work:
    """What a client trains, sends and is sent in any round: methods that take turns do so every second."""
    works = [strategy.brief(replace(begun, round=begun.round + later), who).work for later in range(4)]
    kinds = ((work.trains for work in works), (work.up for work in works), (work.down for work in works))
    return Work(*(frozenset[str]().union(*one) for one in kinds))


def starts_anywhere(strategy: Strategy) -> Strategy:
    """The strategy, if its start needs no other client.

    Raises:
        RecipeError: it starts from all clients' gradients.
    """
    if strategy.begin == "gradient":
        raise RecipeError(
            f"the strategy '{strategy.name}' with begin = 'gradient' runs in a simulation of one process only",
            why="its start is made from the first gradients of all clients, which no one machine has",
            fix="choose begin = 'principal', or another strategy",
        )
    return strategy


def card_of(recipe: r.Recipe, setup: Setup, who: str, start: Adapter) -> Card:
    """What a site says of itself: enough to find out that it does not fit, and nothing of its rows but their number."""
    return Card(
        client=who,
        florana=importlib.metadata.version("florana"),
        torch=torch.__version__.partition("+")[0],
        threads=torch.get_num_threads(),
        instructions=instructions(),
        agreed=agreed(recipe),
        holds=setup.partition["clients"][who],
        common=common_of(setup, start),
    )


def common_of(setup: Setup, start: Adapter) -> Common:
    """What must be the same everywhere; `start` is the adapter before the first round, head included."""
    return Common(
        base=base_digest(setup),
        start=hashlib.sha256(pack(start)).hexdigest(),
        labels=setup.partition["labels"],
        scalings=start.scalings,
        base_parameters=setup.bench.base_parameters,
        adapter=replace(setup.bench.card, base_model=""),
    )


def agreed(recipe: r.Recipe) -> dict[str, Any]:
    """The part of the recipe that must be the same everywhere, by dotted key."""
    table = recipe.model_dump(mode="json", exclude_none=True)
    result: dict[str, Any] = {"seed": recipe.seed, "task": recipe.task, "federation.uplink": recipe.federation.uplink}
    for section in ("model", "data", "partition", "train", "strategy", "privacy"):
        left_out = PLACES.get(section, set())
        result |= {f"{section}.{key}": value for key, value in table[section].items() if key not in left_out}
    return result


def base_digest(setup: Setup) -> str:
    """sha256 over the frozen parameters of the base model: names, shapes, types and bytes, in the order of names."""
    digest = hashlib.sha256()
    for name, parameter in setup.bench.frozen():
        digest.update(f"{name} {tuple(parameter.shape)} {parameter.dtype}\n".encode())
        digest.update(parameter.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
