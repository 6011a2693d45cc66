"""A client's update cut to a length: of the change of its product and of what is trained whole, together."""

from __future__ import annotations

import math

from florana.lora.factors import Adapter
from florana.robust.changes import sizes
from florana.robust.shrink import drawn_back


def clipped(trained: Adapter, received: Adapter, most: float) -> Adapter:
    """The update, drawn back towards what was received until it has at most that norm:

        || (s (B_u A_u - B_0 A_0), h_u - h_0) ||_F <= C

    over all modules and heads together; norms of products are exact, from blocks of 2r x 2r.

    Args:
        trained: after training.
        received: before.
        most: C.

    Examples:
        >>> import torch
        >>> from florana.lora.factors import LoraFactors
        >>> before = Adapter({"q": LoraFactors(torch.zeros(1, 1), torch.ones(1, 1), 1.0)})
        >>> after = Adapter({"q": LoraFactors(torch.full((1, 1), 4.0), torch.ones(1, 1), 1.0)})
        >>> round(float(clipped(after, before, 1.0).modules["q"].B), 4)
        1.0
    """
    whole = math.hypot(*sizes((trained, received), ()).values())
    if not whole > most:
        return trained
    return drawn_back((trained, received), {"product": most / whole, "extra": most / whole})
