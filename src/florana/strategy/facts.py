"""What every method says of itself: what travels, what it goes together with. docs/which-method.md is made from it.

Counts are parameters per module, client and round, without the tensors trained whole (heads). A test holds
them against the messages really sent.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal


@dataclass(frozen=True)
class Size:
    """One module in one round.

    Args:
        out: rows of the module's weight.
        into: columns of the module's weight.
        rank: r, of the LoRA factors a client trains.
        round: counted from 1.
        residual: k, the rank of the frozen part sent along.
        blocks: h, the blocks of its core.
    """

    out: int
    into: int
    rank: int
    round: int = 1
    residual: int = 0
    blocks: int = 1


@dataclass(frozen=True)
class Count:
    """A count of parameters: as a formula for people, and as the same formula to compute.

    Examples:
        >>> PAIR.text, PAIR.of(Size(out=4, into=6, rank=2))
        ('r (out + in)', 20)
    """

    text: str
    of: Callable[[Size], int]


PAIR = Count("r (out + in)", lambda s: s.rank * (s.out + s.into))
ONLY_B = Count("r out", lambda s: s.rank * s.out)
ONLY_A = Count("r in", lambda s: s.rank * s.into)
IN_TURN = Count("r out, r in in turn", lambda s: s.rank * (s.out if s.round % 2 else s.into))
PAIR_AND_RESIDUAL = Count("(r + k) (out + in)", lambda s: (s.rank + s.residual) * (s.out + s.into))
A_AND_RESIDUAL = Count("r in + k (out + in)", lambda s: s.rank * s.into + s.residual * (s.out + s.into))
RESIDUAL = Count("k (out + in)", lambda s: s.residual * (s.out + s.into))


def sketched(k: str, columns: Callable[[int], int]) -> Count:
    """Of two sums of sketches: k out numbers, then k in.

    Args:
        k: as a formula.
        columns: the rank -> k, before the module's own sides bound it.

    Examples:
        >>> sketched("2 r", lambda rank: 2 * rank).of(Size(out=4, into=6, rank=1))
        20
    """
    return Count(f"{k} (out + in)", lambda s: min(columns(s.rank), s.out, s.into) * (s.out + s.into))


def and_range(k: str, columns: Callable[[int], int]) -> Count:
    """The factors, and what is sent between two sums of sketches: an orthonormal basis of k columns."""
    return Count(
        f"r (out + in) + {k} out",
        lambda s: s.rank * (s.out + s.into) + min(columns(s.rank), s.out, s.into) * s.out,
    )


CORE = Count("h (r/h)^2", lambda s: s.rank * s.rank // s.blocks)


@dataclass(frozen=True)
class Facts:
    """The declarations of one method, in words for people and in fields for the checks of a recipe.

    Args:
        does: what the server does, in a few words.
        trains: what a client trains.
        up: parameters sent per module, client and round.
        down: parameters broadcast per module, client and round; k is the rank of the frozen part.
        exact: how near the server's step comes to the true average.
        differs: where florana departs from the publication, or where that could not be told; empty: nowhere known.
        base: whether what clients add to the base model besides the LoRA factors changes over the rounds.
        absent: what a client needs that missed rounds.
        client_state: what a client keeps between rounds, and what its loss means.
        mixed_ranks: what a client of a lower rank gets, or why all must have one rank.
        secure_aggregation: whether the server can work on sums alone; if not, why.
        noise: how noise added to what is sent (differential privacy) enters the result.
        robust: whether the rules of [robust] can stand before it, or `no: ` and why not.
        trained: how many parameters a client trains per module.
        residual: (clients, rank, rounds) -> the most singular components the frozen part can have by then, before the
            module's own sides bound it.
        shape: the recipe's rank -> (the rank of the LoRA factors, the blocks of its core).
        coordinates: `stay` where the factors that go back continue the clients' factors entry by entry; `move` where
            they are chosen anew, so that what rounding left out of the last factors says nothing about the next.
        most: the largest product of clients in a round and rank that the server's step takes on; None: any.
        one_model: False for methods without a global product; they have no global score and no aggregation error.
        optimizer: where a server optimizer can work (`strategy.server_optimizer`), the method's own place first: on the
            `products`, on the `factors` (or cores); empty where the clients need the step's result as it is.
        aims_at_sum: whether the step approximates the weighted sum of the products *and* of what the contributions
            carry frozen, so that more can be added to the sum.
    """

    does: str
    trains: str
    up: Count
    down: Count
    exact: str
    differs: str = ""
    base: str = "stays"
    absent: str = "nothing: every broadcast is complete"
    client_state: str = "none"
    mixed_ranks: str = "refused: factors are combined entry by entry"
    secure_aggregation: str = "no: needs every client's factors"
    noise: str = "in both factors: a product of noises remains"
    robust: str = "all rules"
    trained: Callable[[Size], int] = PAIR.of
    residual: Callable[[int, int, int], int] = lambda clients, rank, rounds: 0
    shape: Callable[[int], tuple[int, int]] = lambda rank: (rank, 1)
    coordinates: Literal["stay", "move"] = "stay"
    most: int | None = None
    one_model: bool = True
    optimizer: tuple[Literal["products", "factors"], ...] = ()
    aims_at_sum: bool = False


def bounded(facts: Facts, most: int | None) -> Facts:
    """The same, with at most so many singular components in the frozen part; as it is where None.

    Args:
        facts: of a method that sends a frozen part.
        most: what an option bounds it to.
    """
    whole = facts.residual
    if most is None:
        return facts
    return replace(facts, residual=lambda clients, rank, rounds: min(most, whole(clients, rank, rounds)))
