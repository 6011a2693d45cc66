"""What one trip of secure sums asks of its clients, how large their numbers can be, and how the sum is read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from florana.errors import RecipeError
from florana.federation.hidden_part import room
from florana.federation.messages import Step, pack_question
from florana.federation.sealed_client import MOST_LOSS
from florana.federation.step_bounds import allowed
from florana.federation.terms import Federation, Sealing
from florana.federation.trip_memory import LOSS
from florana.federation.trips import ROUNDED
from florana.secure import wire
from florana.secure.session import Terms
from florana.strategy.base import Named, Payload, State, Sums


class Question:
    """What a trip asks of the clients, and how their sum is read.

    Args:
        sums: the method's.
        trip: which of them.
        payloads: client -> what it was sent.
        state: what was broadcast.
        means: of the trips before.
        federation: the fixed terms of the run.
        sealing: what the recipe says.
    """

    def __init__(
        self,
        sums: Sums,
        trip: int,
        payloads: Mapping[str, Payload],
        state: State,
        means: Sequence[Named],
        federation: Federation,
        sealing: Sealing,
    ) -> None:
        self.trip, self.payloads = trip, payloads
        later = sums.ask(state.adapter, means) if trip else {}
        unlike = {(id(p.adapter), id(p.question) if p.question else 0): p for p in payloads.values()}
        self.absolute = len(unlike) > 1
        self.questions = {id(p): pack_question(later if trip else p.question) for p in payloads.values()}
        limit = federation.reach(sealing.most) if federation.reach is not None else None
        if limit is None:
            raise RecipeError(
                "secure sums need to know how far training can move a number", fix="train.optimizer = 'adamw'"
            )
        self.bounds: dict[str, float] = {}
        for payload in unlike.values():
            question, sent = later if trip else payload.question, payload.adapter
            untrained = sums.measure(trip, state.round + 1, question, sent, sent)
            may = allowed(limit, sent.tensors(), payload.work.trains)
            for name, bound in sums.bounds(trip, state.round + 1, question, sent, may).items():
                there = float(untrained[name].double().abs().max()) if self.absolute else 0.0
                most = ROUNDED * (bound + there)
                most = most if sealing.clip is None else room(most, sealing.clip, sealing.spread)
                self.bounds[name] = max(self.bounds.get(name, 0.0), most)
            self.before = untrained
        self.shapes = {name: tuple(tensor.shape) for name, tensor in self.before.items()}
        if not trip:
            self.bounds[LOSS], self.shapes[LOSS] = MOST_LOSS, (1,)

    def means(self, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The means themselves, from those of what was summed up."""
        like = self.before
        return {
            name: (value if self.absolute else like[name].double() + value).to(like[name].dtype)
            for name, value in values.items()
        }

    def step(self, terms: Terms, client: str, sealed: Mapping[str, bytes], present: Sequence[str]) -> Step:
        """What one client is asked."""
        payload = self.payloads[client]
        head = {
            "step": "masked",
            "session": terms.session,
            "trip": self.trip,
            "sealed": wire.words_to(sealed),
            "present": list(present),
            "bounds": self.bounds,
            "absolute": self.absolute,
            "scalings": payload.adapter.scalings,
            "returns": sorted(payload.work.up),
        }
        return Step(head, self.questions[id(payload)])
