"""What one server step costs, as a ratio to averaging the factors (FedIT = 1), and how near it comes to the optimum.

    python benchmarks/aggregation.py [--size 4096] [--rank 16] [--clients 10 100] [--threads 1] [--repeats 5]

The seven real clients of all-MiniLM-L6-v2, where the shared data folder is there (errors only), then one module of
size x size with synthetic clients made from a seed: a shared start, a decaying dictionary of directions and a drift.
Their targets decay more slowly than the real adapters'. All peers run in this one process; the fast ones in turn,
three runs a turn, and the median counts; what takes seconds runs once. Beside each time stand two bounds, from this
run's own measurements:

  arithmetic   the flops that this method needs / the rate of a large float32 matrix product
  memory       the bytes it must read and write, each factor once / the rate of a large copy

A method cannot be faster than the larger of its bounds on this machine; the factor mean is bound by memory. Errors are
|| target - answer || / || target || from thin QR, in float64.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from florana import Adapter, Contribution, LoraFactors, best_rank, mean, mix, read_adapter
from florana.aggregate import validate
from florana.aggregate.best_rank.project import by_gram, by_power, by_qr
from florana.aggregate.error import measure
from florana.aggregate.flora_na import adamw
from florana.aggregate.flora_na.scalars import as_factors

REAL = Path(__file__).resolve().parents[2] / "shared" / "data" / "client_adapters" / "minilm-agnews-r8"
FACTOR = "module"


@dataclass(frozen=True)
class Peer:
    """One line of the table: what runs, and the least it must compute (flops) and move (bytes)."""

    name: str
    run: Callable[[], Adapter | None]
    flops: float
    bytes: float
    slow: bool = False  # runs once, without a warm-up


def clients(count: int, size: int, rank: int, seed: int = 0) -> list[Contribution]:
    """Clients that share a start A_0 and a decaying dictionary of directions, each with its own drift in it."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    kinds, drift = 6 * rank, 1.4
    strength = torch.exp(-0.3 * torch.arange(kinds) / rank)
    left, right = normal(size, kinds) / math.sqrt(size) * strength, strength[:, None] * normal(kinds, size)
    A_0, right = normal(rank, size) / math.sqrt(size), right / math.sqrt(size)
    B_way, A_way = normal(kinds, rank), normal(rank, kinds)
    weights = torch.rand(count, generator=generator) * 9 + 1
    return [
        Contribution(
            f"client-{u:03}",
            Adapter(
                {
                    FACTOR: LoraFactors(
                        B=left @ (B_way + drift * normal(kinds, rank)),
                        A=A_0 + (A_way + drift * normal(rank, kinds)) @ right,
                        scaling=2.0,
                    )
                }
            ),
            float(weights[u]),
        )
        for u in range(count)
    ]


def dense_target(parts: Sequence[Contribution]) -> Tensor:
    """The weighted sum as one matrix, as the published code forms it: product by product."""
    pairs = [part.adapter.modules[FACTOR] for part in parts]
    total = torch.zeros(pairs[0].shape)
    for weight, pair in zip(validate.shares(parts), pairs, strict=True):
        total.addmm_(pair.B, pair.A, alpha=weight * pair.scaling)
    return total


def flexlora(parts: Sequence[Contribution], rank: int) -> Adapter:
    """FlexLoRA (arXiv 2402.11505): dense target, full SVD, truncation."""
    left, values, right = torch.linalg.svd(dense_target(parts), full_matrices=False)
    return Adapter({FACTOR: LoraFactors((left[:, :rank] * values[:rank]).contiguous(), right[:rank].clone(), 1.0)})


def fedex(parts: Sequence[Contribution]) -> None:
    """FedEx-LoRA (arXiv 2410.09432): the factor mean and the dense residual that goes into the base. Exact."""
    pair = mean(parts).modules[FACTOR]
    _ = dense_target(parts).addmm_(pair.B, pair.A, alpha=-pair.scaling)


def peft_model(parts: Sequence[Contribution], rank: int) -> object:
    """A PEFT model of one Linear that carries every client as an adapter of its own."""
    from peft import LoraConfig, get_peft_model

    size = parts[0].adapter.modules[FACTOR].shape
    config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=[FACTOR], init_lora_weights=False)
    base = torch.nn.ModuleDict({FACTOR: torch.nn.Linear(size[1], size[0], bias=False)})
    model = get_peft_model(base, config, adapter_name=parts[0].client)  # type: ignore[arg-type]
    for part in parts[1:]:
        model.add_adapter(part.client, config)
    layer = getattr(model.base_model.model, "_modules")[FACTOR]  # noqa: B009
    with torch.no_grad():
        for part in parts:
            layer.lora_A[part.client].weight.copy_(part.adapter.modules[FACTOR].A)
            layer.lora_B[part.client].weight.copy_(part.adapter.modules[FACTOR].B)
    return model


def peft_merged(model: object, parts: Sequence[Contribution], kind: str, rank: int) -> Adapter:
    """`add_weighted_adapter(combination_type=kind)`: `cat` is the stack, rank U r, exact; `svd` a dense one."""
    names, options = [part.client for part in parts], {"svd_rank": rank} if kind == "svd" else {}
    model.base_model.add_weighted_adapter(  # type: ignore[attr-defined]
        names, validate.shares(parts), "merged", combination_type=kind, **options
    )
    layer = model.base_model.model._modules[FACTOR]  # type: ignore[attr-defined]
    B, A = layer.lora_B["merged"].weight.detach().clone(), layer.lora_A["merged"].weight.detach().clone()
    pair = LoraFactors(B, A, layer.scaling["merged"])
    model.base_model.delete_adapter("merged")  # type: ignore[attr-defined]
    return Adapter({FACTOR: pair})


def peers(parts: Sequence[Contribution], rank: int, dense_svd: bool) -> list[Peer]:
    out, into = parts[0].adapter.modules[FACTOR].shape
    total, count = rank * len(parts), len(parts)
    sides, whole, one = out + into, out * into, 4.0 * rank * (out + into)
    read = count * one + one  # every factor once, and the answer written
    model = peft_model(parts, rank)
    many = count > 20
    cross = 2.0 * total**2 * sides  # all inner products of the factors, or one Householder sweep over both stacks
    reads = 2.0 * total * sides  # one multiply-add per entry of the factors

    def fitted() -> Adapter:
        return mix(parts, solver=adamw.solve).adapter

    def within() -> Adapter:
        return best_rank(parts, rank, tolerance=1e-2, way=by_power)

    found: list[Peer] = [
        Peer("mean (FedIT)", lambda: mean(parts), reads, read),
        Peer("best-rank, power", lambda: best_rank(parts, rank, way=by_power), power_flops(parts, rank), read),
        Peer("best-rank, power, tolerance 1 %", within, power_flops(parts, rank), read),
        Peer("best-rank, Gram matrices", lambda: best_rank(parts, rank, way=by_gram), 2 * cross, read, many),
        Peer("best-rank, thin QR + small SVD", lambda: best_rank(parts, rank, way=by_qr), 2 * cross, read, many),
        # One sweep: r per entry for F A_hat^T and T A_hat^T, and as many again on the other side.
        Peer("flora-na, als as chosen", lambda: mix(parts).adapter, 2 * rank * reads, read),
        Peer("flora-na, als from the factors", lambda: mix(parts, way=as_factors).adapter, 2 * rank * reads, read),
        Peer("flora-na, gradient fit of p, q", fitted, cross, read, True),
        Peer("FedEx-LoRA, dense residual", lambda: fedex(parts), 2.0 * total * whole, read + 8.0 * whole, many),
        Peer("PEFT add_weighted_adapter cat", lambda: peft_merged(model, parts, "cat", rank), 0.0, 2 * count * one),
    ]
    if dense_svd:  # bidiagonalisation and both sets of vectors: about 22 n^3
        flops = 2.0 * total * whole + 22.0 * min(out, into) * whole
        found.append(Peer("FlexLoRA, dense SVD", lambda: flexlora(parts, rank), flops, read + 16.0 * whole, True))
        merged = Peer("PEFT add_weighted_adapter svd", lambda: peft_merged(model, parts, "svd", rank), flops,
                      read + 16.0 * whole, True)  # fmt: skip
        found.append(merged)
    return found


def power_flops(parts: Sequence[Contribution], rank: int) -> float:
    """The start's half-step with r columns and one pass of 2 r columns, as many multiplications and additions."""
    out, into = parts[0].adapter.modules[FACTOR].shape
    return 2.0 * rank * len(parts) * (out + into) * (rank + 2 * 2 * rank)


def timed(found: Sequence[Peer], repeats: int) -> dict[str, tuple[float, Adapter | None]]:
    """Median seconds and the answer of every peer; the fast ones take turns."""
    answers: dict[str, Adapter | None] = {}
    seconds: dict[str, list[float]] = {peer.name: [] for peer in found}
    quick = [peer for peer in found if not peer.slow]
    for peer in quick:
        answers[peer.name] = peer.run()  # warm-up
    for repeat in range(repeats):
        for peer in quick + [peer for peer in found if peer.slow and repeat == 0]:
            for _ in range(1 if peer.slow else 3):
                started = time.perf_counter()
                answers[peer.name] = peer.run()
                seconds[peer.name].append(time.perf_counter() - started)
    return {peer.name: (statistics.median(seconds[peer.name]), answers[peer.name]) for peer in found}


def machine() -> tuple[float, float]:
    """(flops per second of a float32 matrix product, bytes per second read and written by a copy), the best of five."""
    a, b = torch.ones(2048, 2048), torch.ones(32 * 2**20)
    c = torch.empty_like(b)
    best = [math.inf, math.inf]
    for _ in range(6):
        started = time.perf_counter()
        _ = a @ a
        middle = time.perf_counter()
        c.copy_(b)
        best = [min(best[0], middle - started), min(best[1], time.perf_counter() - middle)]
    return 2.0 * 2048**3 / best[0], 8.0 * b.numel() / best[1]


def table(parts: Sequence[Contribution], rank: int, repeats: int, dense_svd: bool) -> None:
    rate, bandwidth = machine()
    found = peers(parts, rank, dense_svd)
    times = timed(found, repeats)
    base = times["mean (FedIT)"][0]
    print(f"\n{len(parts)} clients: {rate / 1e9:.0f} Gflop/s in a matrix product, copies at {bandwidth / 1e9:.1f} GB/s")
    print(f"{'rule':34} {'ms':>10} {'of mean':>9} {'error':>9} {'/optimum':>9} {'arithm. ms':>10} {'memory ms':>9}")
    for peer in found:
        seconds, answer = times[peer.name]
        if answer is None:
            error = f"{'0':>9} {'exact':>9}"
        elif answer.modules[FACTOR].rank > rank:
            error = f"{measure(parts, answer).error:9.5f} {'rank Ur':>9}"
        else:
            report = measure(parts, answer)
            error = f"{report.error:9.5f} {report.error / report.optimum:9.4f}"
        print(
            f"{peer.name:34} {seconds * 1e3:10.2f} {seconds / base:9.1f} {error} "
            f"{peer.flops / rate * 1e3:10.2f} {peer.bytes / bandwidth * 1e3:9.2f}",
            flush=True,
        )
    if dense_svd:
        factor = times["FlexLoRA, dense SVD"][0] / times["best-rank, power"][0]
        print(f"best-rank by power is {factor:.0f} x faster than the dense SVD")
    else:
        print("The dense SVDs (FlexLoRA's, PEFT's): not run again; their cost hardly depends on the number of clients")


def real(folder: Path) -> None:
    if not folder.is_dir():
        print(f"\n{folder.name}: absent, the part on real adapters is left out")
        return
    weights = json.loads((folder / "weights.json").read_text())["weights"]
    paths = sorted(folder.glob("client-*"))
    parts = [Contribution(p.name, read_adapter(p)[0], w) for p, w in zip(paths, weights, strict=True)]
    rank = next(iter(parts[0].adapter.modules.values())).rank
    print(f"\nreal adapters: {folder.name}, {len(parts)} clients, {len(parts[0].adapter.modules)} modules")
    rules: dict[str, Callable[[], Adapter]] = {
        "mean (FedIT)": lambda: mean(parts),
        "best-rank, as chosen": lambda: best_rank(parts, rank),
        "best-rank, power": lambda: best_rank(parts, rank, way=by_power),
        "best-rank, Gram matrices": lambda: best_rank(parts, rank, way=by_gram),
        "best-rank, thin QR + small SVD": lambda: best_rank(parts, rank, way=by_qr),
        "flora-na, als": lambda: mix(parts).adapter,
        "flora-na, als from the factors": lambda: mix(parts, way=as_factors).adapter,
    }
    for name, rule in rules.items():
        report = measure(parts, rule())
        worst = max(module.error / module.optimum for module in report.modules.values())
        ratio = report.error / report.optimum
        print(f"{name:34} error {report.error:.5f}, {ratio:.4f} of the optimum, worst module {worst:.4f}")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--size", type=int, default=4096)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--clients", type=int, nargs="+", default=[10, 100])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=7)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    size, rank, threads = arguments.size, arguments.rank, arguments.threads
    print(f"one {size} x {size} module, r = {rank}, float32, {threads} thread(s), median of {arguments.repeats} turns")
    real(REAL)
    for index, count in enumerate(arguments.clients):
        table(clients(count, size, rank), rank, arguments.repeats, dense_svd=index == 0)


if __name__ == "__main__":
    main()
