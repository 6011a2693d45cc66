"""FedASK: the product's average from two sums of sketches (Wen et al., arXiv 2507.09990, section 4 and its code).

Trains B, on an A that all clients share, so that noise added to B enters the product once; the server learns
Y = sum w_u B_u (A Omega) and Z = sum w_u (Q^T B_u) A, with one random Omega for the whole run, and sends the balanced
factors of the best rank r of Q Z: so both factors move. k out numbers up, then k in; k out down between, r (out + in)
at the end. Exact where k is at least the rank of the sum: with a shared A, r.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from florana.aggregate.best_rank.project import best_rank
from florana.lora.factors import Contribution
from florana.strategy import facts
from florana.strategy.base import PAIR, Outcome, State, Strategy, advance, ranks_of, sending, start, work
from florana.strategy.ranks import best_terms
from florana.strategy.two_trips import columns_of, random_once, two_trips

LINEAR = "in B alone: linear; the rest is post-processing"


def build(sketch: int | None = None, trains: Literal["B", "AB"] = "B") -> Strategy:
    """The strategy.

    Args:
        sketch: k, the columns of Omega; None: r where B alone is trained (the authors' setting), else 2 r.
        trains: the factors that clients train.

    Raises:
        RecipeError: a sketch of no columns.
    """
    k, columns = columns_of(sketch, 1 if trains == "B" else 2)
    made_of = facts.Facts(
        does="two sums of sketches of B A, then the best rank r; options `sketch`, `trains`",
        trains=", ".join(trains),
        up=facts.sketched(k, columns),
        down=facts.and_range(k, columns),
        exact="exact where k is at least the sum's rank",
        differs="without differential privacy's noise; factors are balanced with the scaling inside",
        absent="nothing; one that answers the first trip alone is missing from the second sum",
        mixed_ranks="refused: clients share one A" if trains == "B" else "the best adapter of its own rank",
        secure_aggregation="yes: two sums, of sketches",
        noise=LINEAR if trains == "B" else "in both factors: a product of noises; the rest is post-processing",
        robust="no: its server sees sums of sketches, not updates",
        trained=facts.ONLY_B.of if trains == "B" else facts.PAIR.of,
        coordinates="move",
        optimizer=("products",),
        aims_at_sum=True,
    )
    what = work(["B"], up=["B"], down=["A", "B"]) if trains == "B" else PAIR
    sums = two_trips(columns, random_once)
    cut = best_terms if trains == "AB" else None
    return Strategy("fedask", "arXiv 2507.09990", made_of, start, sending(what), _step, cut=cut, sums=sums)


def _step(state: State, parts: Sequence[Contribution]) -> Outcome:
    return Outcome(advance(state, best_rank(parts, ranks_of(state.adapter))))
