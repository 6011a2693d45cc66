"""What secure sums cost: seconds and bytes per client and at the server, beside plain aggregation of the same updates.

    python benchmarks/secure.py [--clients 3,10,30,100,300] [--shapes minilm,roberta-large] [--gone 0.1]

Every client of a row is computed here one after the other; a client's seconds are its own, whole session, mean over the
clients. One sum of all adapter values of the shape (as FedIT has it), 20 bits a number; `gone` of the clients leave
after their shares are out, which is the dearest moment for the server. The plain column is one float32 update and its
weighted mean.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence

import numpy as np
import torch

from florana.secure import member, opening, wire
from florana.secure.identities import made_up
from florana.secure.masks import packed, unpacked
from florana.secure.session import Terms

SIZES = {
    # r = 8 on query and value: 6 layers of 384 x 384, 24 layers of 1024 x 1024
    "minilm": 12 * 8 * (384 + 384),
    "roberta-large": 48 * 8 * (1024 + 1024),
}
BITS = 20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--clients", default="3,10,30,100,300")
    parser.add_argument("--shapes", default="minilm,roberta-large")
    parser.add_argument("--gone", type=float, default=0.1)
    given = parser.parse_args()
    heads = ["adapter", "clients (left)", "client, s", "up, KiB (float32)", "down, KiB", "server, s", "plain mean, s"]
    print("| " + " | ".join(heads) + " |")
    print("|---" * len(heads) + "|", flush=True)
    for shape in given.shapes.split(","):
        for clients in map(int, given.clients.split(",")):
            print(row(shape, SIZES[shape], clients, int(clients * given.gone)), flush=True)


def row(shape: str, size: int, clients: int, gone: int) -> str:
    """One line of the table."""
    names = [f"client-{n:03}" for n in range(clients)]
    who, terms = made_up(names), Terms("s", "run", 1, 0, (0,), BITS, 1000, 2)
    spent, up, down, server = 0.0, 0.0, 0.0, 0.0

    def timed(begin: float) -> None:
        nonlocal spent
        spent += time.perf_counter() - begin

    members, roster, sealed = {}, {}, {}
    for name in names:
        begin = time.perf_counter()
        members[name] = member.begun(name, terms, who[name].sign)
        timed(begin)
        roster[name] = members[name].public
    told = len(json.dumps({name: wire.public_to(public) for name, public in roster.items()}))
    for name in names:
        begin = time.perf_counter()
        members[name], sealed[name] = member.shared(members[name], roster, who[name].verify)
        timed(begin)
        up += len(json.dumps(wire.words_to(sealed[name])))
    routed = opening.routed(sealed)
    here, vector = names[gone:], np.arange(size, dtype=np.uint32) % np.uint32(2**BITS)
    masked, signed, revealed = {}, {}, {}
    for name in here:
        begin = time.perf_counter()
        members[name] = member.received(members[name], routed[name], names)
        members[name], numbers = member.masked(members[name], 0, vector)
        sent = packed(numbers, BITS)
        timed(begin)
        up, down = up + len(sent), down + told + len(json.dumps(wire.words_to(routed[name])))
        begin = time.perf_counter()
        masked[name] = unpacked(sent, size, BITS)
        server += time.perf_counter() - begin
    for name in here:
        begin = time.perf_counter()
        members[name], signed[name] = member.agreed_on(members[name], 0, here, who[name].sign)
        timed(begin)
    down += clients * len(json.dumps(wire.words_to(signed)))
    for name in here:
        begin = time.perf_counter()
        members[name], revealed[name] = member.revealed(members[name], 0, signed, who[name].verify)
        timed(begin)
        up += len(json.dumps(wire.words_to(revealed[name])))
    begin = time.perf_counter()
    total = opening.opened(terms, roster, 0, names, masked, revealed)
    server += time.perf_counter() - begin
    assert np.array_equal(total, (len(here) * vector.astype(np.int64) % 2**BITS).astype(np.uint32))
    plain = mean_of([torch.ones(size)] * len(here))
    cells = [
        shape,
        f"{clients} ({len(here)})",
        f"{spent / clients:.2f}",
        f"{up / clients / 1024:.0f} ({4 * size / 1024:.0f})",
        f"{down / clients / 1024:.0f}",
        f"{server:.2f}",
        f"{plain:.2f}",
    ]
    return "| " + " | ".join(cells) + " |"


def mean_of(updates: Sequence[torch.Tensor]) -> float:
    """Seconds of the plain weighted mean."""
    begin = time.perf_counter()
    total = torch.zeros_like(updates[0], dtype=torch.float64)
    for update in updates:
        total += update.double() / len(updates)
    return time.perf_counter() - begin


if __name__ == "__main__":
    main()
