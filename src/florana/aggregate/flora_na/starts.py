"""Where FLoRA-NA's solvers begin: at FedIT, and at clients alone where FedIT is no good place.

Clients that share a start differ little, and from p = q = w alternating least squares ends at the global minimum
(measured on real adapters and made-up ones). Adapters that were trained apart need not: their factors may cancel in the
mean ((B, A) and (-B, -A) hold one product and average to zero), and one minimum is not another. So the solver begins
at single clients too, p = q = e_u, and the lowest end counts. That is left out where FedIT's squared error is below
`NEAR` times the least that one client's product has (scaled at best, where there is no base): measured on real adapters
with their factors turned, permuted or with other signs, no lone start then ended lower, and the answer is below every
start in any case.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from florana.aggregate.flora_na.gram import Blocks, whole_blocks
from florana.aggregate.flora_na.matrix_free import PROBES, Directions, Products, probes, target_times

NEAR = 0.5
"""Where FedIT's squared error is below this share of the best single client's, it is the only start."""

MOST = 16
"""The most starts that are tried from inner products, where a sweep costs little."""

FEW = 8
"""The most starts that are tried from the factors, where every sweep reads all of them."""


def of_blocks(blocks: Sequence[Blocks], fedit: float) -> Tensor:
    """The starts (S, U), p = q in each row: the weights first, then the clients nearest to the target alone.

    Args:
        blocks: one entry per module; the same clients and weights in each.
        fedit: the squared error at p = q = weights.

    Examples:
        >>> one = torch.ones(3, 3, 1, 1).double()
        >>> one[0] = one[:, 0] = 0.0  # no base; two clients with one product
        >>> of_blocks([Blocks(one, one, torch.tensor([0.5, 0.5]).double())], fedit=0.0)
        tensor([[0.5000, 0.5000]], dtype=torch.float64)
    """
    figures = torch.zeros((3, len(blocks[0].weights)), dtype=torch.float64, device=blocks[0].weights.device)
    for block in blocks:
        G, H = whole_blocks(block.G), whole_blocks(block.H)
        towards = torch.einsum("v,vuab,vuab->u", block.weights, G, H)
        own = torch.einsum("uuab,uuab->u", G, H)
        figures += block.unit * torch.stack([(block.weights @ towards).expand_as(own), towards, own])
    return _chosen(blocks, fedit, figures, MOST)


def of_directions(modules: Sequence[Directions]) -> Tensor:
    """The same with all figures estimated from random columns Z: <X, Y> by <X Z, Y Z>; at most FEW starts."""
    fedit = 0.0
    figures = torch.zeros((3, len(modules[0].weights)), dtype=torch.float64, device=modules[0].weights.device)
    for module in modules:
        columns = probes(module)
        target = target_times(module, columns)  # (out, k)
        rows = module.F @ columns + module.F_0 @ columns  # A_u Z, (U, r, k)
        products = ((module.D @ rows + module.D_0 @ rows).flatten(1)).double()  # P_u Z, (U, out k)
        mean = module.B @ (module.A @ columns)
        fedit += module.unit / PROBES * float((target - mean).double().square().sum())
        target = target.double().flatten()
        whole, own = (target @ target).expand(len(products)), products.square().sum(dim=1)
        figures += module.unit / PROBES * torch.stack([whole, products @ target, own])
    return _chosen(modules, fedit, figures, FEW)


def _chosen(modules: Sequence[Products], fedit: float, figures: Tensor, most: int) -> Tensor:
    """The weights, and the best clients alone unless FedIT is near.

    Args:
        figures: (3, U), ||T||^2 and for each client's product P_u = B_u A_u <T, P_u> and ||P_u||^2.
    """
    weights, (whole, towards, own) = modules[0].weights, figures
    if any(module.has_base for module in modules):  # p = q = e_u is that client, and a multiple of it is another model
        alone = whole - 2 * towards + own
    else:
        alone = whole - torch.where(own > 0, towards.square() / own.clamp_min(torch.finfo(own.dtype).tiny), 0.0)
    if fedit <= NEAR * float(alone.min()):
        return weights[None]
    best = torch.argsort(alone, stable=True)[: most - 1]
    return torch.cat([weights[None], torch.eye(len(weights), dtype=weights.dtype, device=weights.device)[best]])
