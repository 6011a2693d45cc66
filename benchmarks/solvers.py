"""FLoRA-NA's two solvers on real client adapters: seconds as a ratio, errors side by side.

    python benchmarks/solvers.py [--adapters FOLDER] [--repeats N]

Each line is one reading of the paper (what is combined x how widely the coefficients are shared). The peers run in turn
in one process, one thread; the median of the repeats counts. `dense` is the published style as public code does it:
the (out x in) products are formed and AdamW differentiates through them. Adapters: seven clients of all-MiniLM-L6-v2.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from florana import Adapter, Contribution, LoraFactors, best_rank, mean, measure, mix, read_adapter
from florana.aggregate import validate
from florana.aggregate.flora_na import adamw
from florana.aggregate.flora_na.scalars import per_model, per_module

DEFAULT = Path(__file__).resolve().parents[2] / "shared" / "data" / "client_adapters" / "minilm-agnews-r8"


def load(folder: Path) -> list[Contribution]:
    weights = json.loads((folder / "weights.json").read_text())["weights"]
    return [
        Contribution(path.name, read_adapter(path)[0], weight)
        for path, weight in zip(sorted(folder.glob("client-*")), weights, strict=True)
    ]


def dense(parts: Sequence[Contribution], steps: int = 200) -> Adapter:
    """One multiplier per client and side, per module, fitted by AdamW through the dense product."""
    weights = torch.tensor(validate.shares(parts))
    modules = {}
    for name, pairs in validate.columns(parts).items():
        Bs, As = torch.stack([p.B for p in pairs]), torch.stack([p.A for p in pairs])
        target = torch.einsum("u,uor,uri->oi", weights, Bs, As)
        multipliers = torch.ones(2, len(parts), requires_grad=True)
        optimizer = torch.optim.AdamW([multipliers], lr=1e-2)
        best, kept = math.inf, multipliers.detach().clone()
        for step in range(steps + 1):
            B = torch.einsum("u,uor->or", weights * multipliers[0], Bs)
            A = torch.einsum("u,uri->ri", weights * multipliers[1], As)
            loss = (B @ A - target).square().sum() / target.square().sum()
            if float(loss.detach()) < best:
                best, kept = float(loss.detach()), multipliers.detach().clone()
            if step == steps:
                break
            progress = min(1.0, step / (0.75 * steps))
            optimizer.param_groups[0]["lr"] = 1e-4 + (1e-2 - 1e-4) * 0.5 * (1 + math.cos(math.pi * progress))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        B = torch.einsum("u,uor->or", weights * kept[0], Bs)
        A = torch.einsum("u,uri->ri", weights * kept[1], As)
        modules[name] = LoraFactors(B=B, A=A, scaling=pairs[0].scaling)
    return Adapter(modules, validate.average_extra(parts))


def timed(rule: Callable[[], Adapter], repeats: int) -> tuple[float, Adapter]:
    answer = rule()  # warm-up
    seconds = []
    for _ in range(repeats):
        started = time.perf_counter()
        answer = rule()
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds), answer


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--adapters", type=Path, default=DEFAULT)
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()
    if not arguments.adapters.is_dir():
        raise SystemExit(f"{arguments.adapters} is absent: give a folder of client adapters with --adapters")
    torch.set_num_threads(1)
    parts = load(arguments.adapters)
    rank = next(iter(parts[0].adapter.modules.values())).rank
    base_time, averaged = timed(lambda: mean(parts), arguments.repeats)

    def row(name: str, seconds: float, answer: Adapter, note: str = "") -> None:
        error = measure(parts, answer)
        per_module_mean = statistics.mean(m.error for m in error.modules.values())
        print(
            f"{name:34} {seconds * 1e3:9.1f} ms {seconds / base_time:9.1f} x  {error.error:.5f}  "
            f"{per_module_mean:.5f}  {note}"
        )

    print(
        f"{len(parts)} clients, {len(averaged.modules)} modules, rank {rank}, one thread, median of {arguments.repeats}"
    )
    print(f"{'rule':34} {'seconds':>12} {'of mean':>11}  {'error':7}  {'mean over modules':7}")
    row("mean (FedIT)", base_time, averaged)
    row("best-rank", *timed(lambda: best_rank(parts, rank), arguments.repeats))
    # Updates need the last broadcast, which is not stored with the adapters: half the mean stands for it, outside no
    # claim about training; it times the same arithmetic.
    base = Adapter({n: LoraFactors(p.B / 2, p.A / 2, p.scaling) for n, p in averaged.modules.items()}, averaged.extra)
    for combine, start in (("factors", None), ("updates", base)):
        for scope, fit in (("module", per_module), ("model", per_model)):
            fast, answer = timed(
                lambda fit=fit, start=start: mix(parts, fit=fit, base=start).adapter, arguments.repeats
            )
            slow, other = timed(
                lambda fit=fit, start=start: mix(parts, solver=adamw.solve, fit=fit, base=start).adapter,
                max(1, arguments.repeats // 2),
            )
            row(f"flora-na {combine}/{scope} als", fast, answer)
            row(f"flora-na {combine}/{scope} adamw", slow, other, f"als is {slow / fast:.0f} x faster")
            if (combine, scope) == ("factors", "module"):
                old, published = timed(lambda: dense(parts), 1)
                row("flora-na factors/module dense adamw", old, published, f"als is {old / fast:.0f} x faster")


if __name__ == "__main__":
    main()
