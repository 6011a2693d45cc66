"""The answer for one module and how far it is from the true sum, both from one factorisation.

With the target X Y, X (out, R), Y (R, in), everything follows from the two Gram matrices G = X^T X and H = Y Y^T:

    G = K^T K        K H K^T = U diag(sigma^2) U^T        ||X Y||^2 = <G, H>
    s B_hat A_hat = X (H K^T U_r sigma_r^-2) (U_r^T K) Y        error^2 = ||X Y||^2 - sum_{k <= r} sigma_k^2

which costs a few products over the long sides where QR costs many. Squares found so carry an error of about
R * eps * |G| |H|. Where that could show in an error figure (more than `EXACT` of it), and where the target has no more
than r terms, the two thin QR of `linalg.decompose` answer instead, as in `best_rank` and `measure`.

Where R reaches min(out, in), the product itself is smaller than the two factors (out * in < (out + in) R) and stands
in for the wider one, beside an identity: pieces are folded into it as they come, so that the memory of a thousand
adapters is that of one module. This is the one place where florana forms an (out x in) matrix, for it is the least.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from florana.errors import InputError
from florana.lora import linalg
from florana.lora.factors import LoraFactors

EXACT = 1e-10
"""Relative error figures from Gram matrices are off by no more than this; else QR is taken."""

FOLD = 256
"""Columns that are widened to float64 at once where a sum is folded into its product."""


@dataclass(frozen=True, eq=False)
class Target:
    """A weighted sum as a product of width at most min(out, in), and the largest of its scalings.

    `product` is the sum itself where it stands in for one factor, `unit` the other one, which is then an identity.
    """

    stack: linalg.Stack
    scaling: float
    product: Tensor | None = None
    unit: Tensor | None = None


@dataclass(frozen=True, eq=False)
class Answer:
    """A module's merged pair as it is stored, and squared norms: of what it misses of the target, of the least that
    any pair of its rank misses, and of the target."""

    pair: LoraFactors
    missed: float
    least: float
    whole: float

    @property
    def error(self) -> float:
        """|| target - s B A || / || target ||."""
        return relative(self.missed, self.whole)

    @property
    def optimum(self) -> float:
        """The least error of that rank."""
        return relative(self.least, self.whole)


def relative(square: float, whole: float) -> float:
    """sqrt(square / whole), with differences below the rounding of float64 read as zero."""
    if square <= 1e-30 * whole:
        return 0.0
    return math.sqrt(square / whole) if whole > 0 else math.inf


def nearest(pieces: Iterable[tuple[float, LoraFactors]], rank: int, dtype: torch.dtype) -> Answer:
    """The pair of rank `rank` nearest to the sum of coefficient * s B A, stored in `dtype`, and its error.

    Args:
        pieces: (coefficient, pair) of one shape; taken one by one, and let go where the sum is wide.
        rank: at least 1; padded with zeros where the sum has a lower rank.
        dtype: of the factors that are returned.

    Examples:
        >>> eye = torch.eye(3)
        >>> pieces = [(0.75, LoraFactors(eye[:, :1], eye[:1], 1.0)), (0.25, LoraFactors(eye[:, 1:2], eye[1:2], 1.0))]
        >>> answer = nearest(pieces, rank=1, dtype=torch.float32)
        >>> round(float((answer.pair.B @ answer.pair.A).norm()), 4), round(answer.error, 4)
        (0.75, 0.3162)
    """
    if rank < 1:
        raise InputError(f"the rank {rank} is not at least 1")
    target = gathered(pieces)
    return _by_gram(target, rank, dtype) or _by_qr(target, rank, dtype)


def judged(pieces: Iterable[tuple[float, LoraFactors]], pair: LoraFactors, rank: int | None = None) -> Answer:
    """How far `pair`, whatever rule it came from, is from the sum of the pieces: `measure` for one module.

    Args:
        pieces: (coefficient, pair) of one shape.
        pair: what came out.
        rank: whose optimum is told; the pair's own where None.
    """
    rank = pair.rank if rank is None else rank
    target = gathered(pieces)
    grams = _Grams.of(target)
    squares = linalg.singular_values(target.stack).square() if grams is None else grams.values()
    whole, least = float(squares.sum()), float(squares[rank:].clamp_min(0.0).sum())
    if grams is not None and grams.coarse > (_shows(least, whole) if rank < len(squares) else EXACT * whole):
        squares = linalg.singular_values(target.stack).square()  # of terms that cancel, the whole is coarse too
        whole, least = float(squares.sum()), float(squares[rank:].sum())
    return Answer(pair, _missed(target, pair, grams), least, whole)


def gathered(pieces: Iterable[tuple[float, LoraFactors]]) -> Target:
    """The sum of coefficient * s B A; once the pieces are as wide as the module, they are folded into the product."""
    waiting: list[tuple[float, LoraFactors]] = []
    scaling, width, product = 0.0, 0, None
    for coefficient, pair in pieces:
        waiting.append((coefficient, pair))
        scaling, width = max(scaling, pair.scaling), width + pair.rank
        if width >= (min(pair.shape) if product is None else FOLD):
            product, waiting, width = _folded(product, waiting), [], 0
    if product is None:
        return Target(_stacked(waiting), scaling)
    if waiting:
        product = _folded(product, waiting)
    unit = torch.eye(min(product.shape), dtype=torch.float64, device=product.device)
    tall = product.shape[0] >= product.shape[1]
    return Target(linalg.Stack(product, unit) if tall else linalg.Stack(unit, product), scaling, product, unit)


def _folded(product: Tensor | None, pieces: Sequence[tuple[float, LoraFactors]]) -> Tensor:
    """`product` (zero where None) plus the pieces, in place, about FOLD columns at a time."""
    if product is None:
        product = torch.zeros(pieces[0][1].shape, dtype=torch.float64, device=pieces[0][1].B.device)
    start, width = 0, 0
    for end, (_, pair) in enumerate(pieces, start=1):
        width += pair.rank
        if width >= FOLD or end == len(pieces):
            part = _stacked(pieces[start:end])
            product.addmm_(part.left, part.right)
            start, width = end, 0
    return product


def _stacked(pieces: Sequence[tuple[float, LoraFactors]]) -> linalg.Stack:
    """`linalg.stack` without its intermediate copies: each piece is widened in its own place."""
    out, into = pieces[0][1].shape
    width = sum(pair.rank for _, pair in pieces)
    left = torch.empty(out, width, dtype=torch.float64, device=pieces[0][1].B.device)
    right = torch.empty(width, into, dtype=torch.float64, device=pieces[0][1].B.device)
    start = 0
    for coefficient, pair in pieces:
        end = start + pair.rank
        left[:, start:end].copy_(pair.B).mul_(coefficient * pair.scaling)
        right[start:end].copy_(pair.A)
        start = end
    return linalg.Stack(left, right)


@dataclass(frozen=True, eq=False)
class _Grams:
    """G = X^T X and H = Y Y^T of a stack X Y, its squared norm, and how far squared norms from them may be off."""

    G: Tensor
    H: Tensor
    whole: float
    coarse: float
    unit: Tensor | None

    @classmethod
    def of(cls, target: Target) -> _Grams | None:
        """None where a square leaves the range of float64, or all is zero."""
        X, Y = target.stack.left, target.stack.right
        G = X if X is target.unit else X.T @ X
        H = Y if Y is target.unit else Y @ Y.T
        whole = float((G * H).sum())
        # No eigenvalue is above the largest row sum.
        size = float(G.abs().sum(dim=1).max() * H.abs().sum(dim=1).max())
        coarse = len(G) * torch.finfo(torch.float64).eps * size
        return cls(G, H, whole, coarse, target.unit) if math.isfinite(coarse) and whole > 0 else None

    def values(self) -> Tensor:
        """sigma^2, descending: `squares` without the vectors, which take most of its time."""
        if self.H is self.unit:
            core = self.G
        else:
            K = self.G if self.G is self.unit else _root(self.G)
            core = self.H if K is self.unit else K @ self.H @ K.T
        return torch.flip(torch.linalg.eigvalsh(core), (0,))

    def squares(self) -> tuple[Tensor, Tensor, Tensor]:
        """sigma^2, descending, the vectors U beside them, and the root K."""
        if self.H is self.unit:  # the eigenvectors of G give both: K = sigma V^T, U = 1
            values, V = torch.linalg.eigh(self.G)
            return values.flip(0), self.unit, (V * values.clamp_min(0.0).sqrt()).flip(1).T
        K = self.G if self.G is self.unit else _root(self.G)
        values, U = torch.linalg.eigh(self.H if K is self.unit else K @ self.H @ K.T)
        return values.flip(0), U.flip(1), K


def _by_gram(target: Target, rank: int, dtype: torch.dtype) -> Answer | None:
    """The answer from the Gram matrices; None where they are too coarse for it."""
    X, Y, scaling = target.stack.left, target.stack.right, target.scaling
    grams = _Grams.of(target) if rank < X.shape[1] else None
    if grams is None:
        return None
    values, U, K = grams.squares()
    squares, U = values[:rank], U[:, :rank]
    least = grams.whole - float(squares.sum())
    if grams.coarse > _shows(least, grams.whole) or float(squares[-1]) <= 0:
        return None
    root = squares.sqrt().sqrt() * math.sqrt(scaling)  # sigma^(1/2) s^(1/2)
    B = X @ (grams.H @ (K.T @ (U * (root / (squares * scaling)))))
    A = ((U / root).T @ K) @ Y
    signed = linalg.fixed_signs(linalg.Decomposition(B, squares, A))
    B, A = signed.left, signed.right
    for norms in (torch.linalg.vector_norm(B, dim=0), torch.linalg.vector_norm(A, dim=1)):
        if not torch.allclose(norms.square() * scaling, squares.sqrt(), rtol=1e-7, atol=0.0):
            return None  # both are sigma^(1/2) / s^(1/2), unless digits were lost
    pair = LoraFactors(B=B.to(dtype), A=A.to(dtype), scaling=scaling)
    # Storing in `dtype` moves the product by at most 2 u sum(sigma_k), across the part left out: the squares add.
    rounding = (2 * torch.finfo(dtype).eps * float(squares.sqrt().sum())) ** 2
    provable = rounding <= _shows(least, grams.whole)
    return Answer(pair, least if provable else _missed(target, pair, grams), least, grams.whole)


def _by_qr(target: Target, rank: int, dtype: torch.dtype) -> Answer:
    """The answer from two thin QR, its error measured on the pair as stored: every digit of a small error counts."""
    found = linalg.decompose(target.stack)
    pair = linalg.balanced(linalg.kept(found, rank), target.scaling, dtype)
    squares = found.values.square()
    return Answer(pair, _missed(target, pair, None), float(squares[rank:].sum()), float(squares.sum()))


def _missed(target: Target, pair: LoraFactors, grams: _Grams | None) -> float:
    """|| target - s B A ||^2 in the cheapest way that keeps its digits."""
    X, Y = target.stack.left, target.stack.right
    B, A = pair.B.double() * pair.scaling, pair.A.double()
    if target.product is not None:
        return float(torch.addmm(target.product, B, A, alpha=-1.0).square().sum())
    if pair.rank == X.shape[1]:  # X Y - B A = (X - B) Y + B (Y - A): of a stack, only the rounding is left
        E, F = X - B, Y - A
        if E.square().sum() <= 1e-3 * X.square().sum() and F.square().sum() <= 1e-3 * Y.square().sum():
            left, right = torch.cat([E, B], dim=1), torch.cat([Y, F], dim=0)
            return max(0.0, float(((left.T @ left) * (right @ right.T)).sum()))
    if grams is not None:
        cross = float(((X.T @ B) * (Y @ A.T)).sum())
        missed = grams.whole - 2 * cross + float(((B.T @ B) * (A @ A.T)).sum())
        if 4 * grams.coarse <= _shows(missed, grams.whole):
            return missed
    return linalg.norm(linalg.join(target.stack, linalg.Stack(B, A), sign=-1.0)) ** 2


def _shows(square: float, whole: float) -> float:
    """The change of `square` that changes sqrt(square / whole) by EXACT."""
    return 2 * EXACT * math.sqrt(max(square, 0.0) * whole)


def _root(gram: Tensor) -> Tensor:
    """K with K^T K = gram; from its eigenvalues where it has no Cholesky factor (twins among the columns)."""
    lower: Tensor
    lower, failed = torch.linalg.cholesky_ex(gram)
    if int(failed):
        values, vectors = torch.linalg.eigh(gram)
        lower = vectors * values.clamp_min(0.0).sqrt()
    return lower.T
