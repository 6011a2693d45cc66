"""FLoRA-NA's objective from the factors themselves: no inner products between clients, for many clients of some rank.

With q fixed, A_hat = F_0 + sum_i q_i F_i, S = A_hat A_hat^T and T the target, the error in p is quadratic with

    N_uv = <D_u S, D_v>          g_u = <D_u, T A_hat^T - B_hat S>          (g half the negative gradient at p)

and N s = <D_u, (sum_v s_v D_v) S> costs 2 U r out multiply-adds, where the U x U blocks of `blocks` cost U^2 r^2 out
once. The half-step p <- p + N^+ g is taken by conjugate gradients started at p: they stay in the range
of N, so they end at the same least-norm step as the pseudo-inverse, and every iteration lowers the error by an amount
that is known exactly. Clients near one another give N = a 1 1^T + nearly diagonal: two to four iterations serve.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from florana.aggregate.flora_na.gram import Blocks, blocks_of

PROBES = 16


@dataclass(frozen=True, eq=False)
class Directions:
    """One module's factors as FLoRA-NA mixes them: B_hat = D_0 + sum_u p_u D_u, A_hat = F_0 + sum_u q_u F_u.

    Args:
        D: (U, out, r), B_u - B_0 with the scalings inside.
        F: (U, r, in), A_u - A_0.
        D_0: (out, r), B_0; zeros where whole factors are mixed.
        F_0: (r, in), A_0; zeros where whole factors are mixed.
        weights: (U,), float64, summing to 1.
        B: (out, r), the factor B of p = q = weights: FedIT's.
        A: (r, in), the factor A of p = q = weights: FedIT's.
        unit: what one unit of squared error of this module counts in a sum over modules.
    """

    D: Tensor
    F: Tensor
    D_0: Tensor
    F_0: Tensor
    weights: Tensor
    B: Tensor
    A: Tensor
    unit: float = 1.0

    @property
    def has_base(self) -> bool:
        """Whether updates are mixed: a pair of zeros is no base."""
        return bool(self.D_0.any()) or bool(self.F_0.any())

    def left(self, p: Tensor) -> Tensor:
        """B_hat for p (U,), or for p (U, r) with one coefficient per column."""
        return self.D_0 + (mixed(self.D, p) if p.ndim == 1 else torch.einsum("ur,uor->or", p.to(self.D), self.D))

    def right(self, q: Tensor) -> Tensor:
        """A_hat for q (U,), or for q (U, r) with one coefficient per row."""
        return self.F_0 + (mixed(self.F, q) if q.ndim == 1 else torch.einsum("ur,uri->ri", q.to(self.F), self.F))

    def blocks(self) -> Blocks:
        """All inner products of the directions: U^2 r^2 (out + in) multiply-adds in float64."""
        found = blocks_of([self.D_0, *self.D], [self.F_0, *self.F], self.weights)
        return Blocks(found.G, found.H, found.weights, self.unit)


Products = Blocks | Directions
"""What a solver sees of one module: all inner products, made once, or the directions, read in every step."""


@dataclass(frozen=True, eq=False)
class Quadratic:
    """One side of one module: its error around the present coefficients x of that side, the other side fixed.

    Args:
        gradient: (U,), g at x, half the negative gradient.
        spread: s -> sum_u s_u of the side's directions, the move of its factor.
        bend: that move -> N s.
        size: ||B_hat A_hat||^2, against which a fall is rounding or not.
    """

    gradient: Tensor
    spread: Callable[[Tensor], Tensor]
    bend: Callable[[Tensor], Tensor]
    size: float


def mixed(stack: Tensor, coefficients: Tensor) -> Tensor:
    """sum_u coefficients_u stack_u for coefficients (U,), in one pass over the stack."""
    return (coefficients.to(stack) @ stack.flatten(1)).view(stack.shape[1:])


SAFE = 20
"""Sides whose largest entry is within 2^-SAFE and 2^SAFE are taken as they are: products of eight such entries are far
from the ends of float32."""


def rescaled(module: Directions) -> Directions:
    """The same problem with the largest entry of each side near 1, where it was not, by powers of two: nothing is
    rounded, p and q stay, and `unit` makes up for the errors' new size. From 1e-9 or 1e9 on, squares of squares of
    float32 factors would vanish or overflow, and the solver would stop where it began.

    Examples:
        >>> tiny = torch.full((2, 1, 1), 1e-30)
        >>> half = torch.tensor([0.5, 0.5]).double()
        >>> module = Directions(tiny, tiny, torch.zeros(1, 1), torch.zeros(1, 1), half, tiny[0], tiny[0])
        >>> 0.5 <= float(rescaled(module).D.max()) <= 1.0
        True
    """
    left, right = _exponent(module.D, module.D_0), _exponent(module.F, module.F_0)
    if left == right == 0:
        return module
    unit = module.unit * math.ldexp(1.0, max(-1000, min(1000, 2 * (left + right))))
    D, D_0, B = (_shifted(x, -left) for x in (module.D, module.D_0, module.B))
    F, F_0, A = (_shifted(x, -right) for x in (module.F, module.F_0, module.A))
    return Directions(D, F, D_0, F_0, module.weights, B, A, unit)


def _exponent(*tensors: Tensor) -> int:
    """e with the largest entry in [2^(e-1), 2^e), or 0 where that is within SAFE."""
    size = max(float(max(abs(bound) for bound in torch.aminmax(tensor))) for tensor in tensors)
    exponent = math.frexp(size)[1]
    return exponent if abs(exponent) > SAFE else 0


def _shifted(tensor: Tensor, exponent: int) -> Tensor:
    """tensor * 2^exponent, in two steps: one of them alone may be out of the type's range."""
    half = exponent // 2
    return tensor * 2.0**half * 2.0 ** (exponent - half)


def inner(stack: Tensor, other: Tensor) -> Tensor:
    """<stack_u, other> for every u, (U,), float64."""
    return (stack.flatten(1) @ other.flatten()).double()


def in_p(module: Directions, B: Tensor, A: Tensor) -> Quadratic:
    """The error in p around (B_hat, A_hat) = (B, A)."""
    S = A @ A.T
    wanted = target_times(module, A.T)  # T A_hat^T
    return Quadratic(
        gradient=module.unit * inner(module.D, wanted - B @ S),
        spread=lambda s: mixed(module.D, s),
        bend=lambda move: module.unit * inner(module.D, move @ S),
        size=module.unit * float((B.T @ B * S).sum()),
    )


def in_q(module: Directions, B: Tensor, A: Tensor) -> Quadratic:
    """The error in q around (B_hat, A_hat) = (B, A)."""
    S = B.T @ B
    towards = torch.matmul(B.T, module.D) + B.T @ module.D_0  # B_hat^T B_v, (U, r, r)
    towards *= module.weights.to(towards)[:, None, None]
    wanted = towards.sum(dim=0) @ module.F_0 + towards.transpose(0, 1).flatten(1) @ module.F.flatten(0, 1)  # B_hat^T T
    return Quadratic(
        gradient=module.unit * inner(module.F, wanted - S @ A),
        spread=lambda s: mixed(module.F, s),
        bend=lambda move: module.unit * inner(module.F, S @ move),
        size=module.unit * float((A @ A.T * S).sum()),
    )


def probes(module: Directions) -> Tensor:
    """PROBES random columns (in, PROBES), the same in every call."""
    noise = torch.randn(
        module.A.shape[1], PROBES, generator=torch.Generator("cpu").manual_seed(0), dtype=torch.float64, device="cpu"
    )
    return noise.to(module.A)


def target_times(module: Directions, columns: Tensor) -> Tensor:
    """T columns, (out, k) for columns (in, k)."""
    towards = (module.F.flatten(0, 1) @ columns).view(len(module.F), -1, columns.shape[1]) + module.F_0 @ columns
    towards *= module.weights.to(towards)[:, None, None]  # w_v A_v columns
    product = module.D_0 @ towards.sum(dim=0)
    for D_v, K_v in zip(module.D, towards, strict=True):
        product.addmm_(D_v, K_v)
    return product


def square_estimate(module: Directions, B: Tensor, A: Tensor) -> float:
    """|| T - B A ||_F^2 estimated without bias from PROBES random columns z: the mean of || (T - B A) z ||^2.

    Relative standard deviation sqrt(2 / (PROBES k)) for an error of k equal singular values (Hutchinson, 1990). The
    probes are the same in every call.
    """
    noise = probes(module)
    missed = target_times(module, noise) - B @ (A @ noise)
    return module.unit * float(torch.linalg.vector_norm(missed)) ** 2 / PROBES


def against_target(module: Directions, B: Tensor, A: Tensor) -> tuple[float, float]:
    """<T, B A> and ||B A||_F^2, exact: the error of c B A is ||T||^2 - 2 c <T, B A> + c^2 ||B A||^2."""
    own = float(((B.T @ B).double() * (A @ A.T).double()).sum())
    cross = float((target_times(module, A.T) * B).sum(dtype=torch.float64))
    return module.unit * cross, module.unit * own


def step(sides: Sequence[Quadratic], precision: float, rounding: float) -> tuple[Tensor, list[Tensor | float], float]:
    """The step N^+ g of modules that share coefficients, by conjugate gradients.

    Args:
        sides: the modules' quadratics at the same coefficients.
        precision: stop after an iteration that adds no more than this share to the fall.
        rounding: the resolution of the factors' dtype; a residual below it is noise.

    Returns:
        The step (U,); the move of each module's factor (0.0 for none), which the iteration knows anyway; the fall.

    Examples:
        >>> N, g = torch.tensor([[2.0, 0.0], [0.0, 0.0]]).double(), torch.tensor([4.0, 0.0]).double()
        >>> step([Quadratic(g, lambda s: s, lambda move: N @ move, 1.0)], 1e-12, 1e-16)[0::2]
        (tensor([2., 0.], dtype=torch.float64), 8.0)
    """
    residual = torch.stack([side.gradient for side in sides]).sum(dim=0)
    total, fall = torch.zeros_like(residual), 0.0
    moved: list[Tensor | float] = [0.0] * len(sides)
    along, square = residual, float(residual @ residual)
    first = square
    for _ in range(2 * len(residual)):
        if square <= rounding**2 * first:
            break
        moves = [side.spread(along) for side in sides]
        bent = torch.stack([side.bend(move) for side, move in zip(sides, moves, strict=True)]).sum(dim=0)
        curvature = float(along @ bent)
        if not curvature > 0.0:
            break
        length = square / curvature
        total, fall = total + length * along, fall + length * square
        moved = [length * move + old for move, old in zip(moves, moved, strict=True)]
        if length * square <= precision * fall:
            break
        residual = residual - length * bent
        before, square = square, float(residual @ residual)
        along = residual + (square / before) * along
    return total, moved, fall
