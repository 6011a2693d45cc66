"""What a site does at the end of a federation: the adapter that the server sends is checked and written beside its key.

    SITE/adapter/          the last one, as PEFT loads it, with florana.json
    SITE/adapter-before/   the one before it, of another run or of this one with fewer rounds

The server's bytes are untrusted: names and shapes are those of this site's own model, only the rank may be another.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from florana.adapters.adapter_folder import WEIGHTS, AdapterCard, write_adapter
from florana.atomic_files import explained
from florana.errors import InputError
from florana.federation.messages import unpack_whole
from florana.flower.app.frames import Frame
from florana.lora.factors import Adapter
from florana.recipe.usage import Usage, write_usage


def checked(frame: Frame, first: Adapter, own: Mapping[str, Tensor]) -> Adapter:
    """The adapter in a server's last message, with what this site keeps to itself.

    Args:
        frame: of the kind `ended`.
        first: the adapter before the first round: it has the names and shapes of this site's model.
        own: what this site kept, by the names of `Adapter.tensors`: a head of its own.

    Raises:
        InputError: the bytes are no adapter of this model.
    """
    scalings = frame.fields.get("scalings")
    if not isinstance(scalings, dict) or not all(type(value) in (int, float) for value in scalings.values()):
        raise InputError("the server's last message has no scalings")
    sent = unpack_whole(frame.payload, scalings)
    if sent.modules.keys() != first.modules.keys():
        raise InputError("the server's adapter has other modules than this site's model")
    for name, pair in sent.modules.items():
        mine = first.modules[name]
        if pair.shape != mine.shape or pair.A.dtype != mine.A.dtype:
            raise InputError(f"the server's adapter does not fit module '{name}'")
    kept = {name: tensor for name, tensor in own.items() if name.startswith("extra/")}
    heads = {**sent.extra, **{name.removeprefix("extra/"): tensor for name, tensor in kept.items()}}
    for name, tensor in heads.items():
        mine_of = first.extra.get(name)
        if mine_of is None or tensor.shape != mine_of.shape or tensor.dtype != mine_of.dtype:
            raise InputError(f"the server's adapter has a tensor '{name[:80]}' that this site's model has not")
    whole = Adapter(sent.modules, heads)
    for name, tensor in whole.tensors().items():
        if not bool(torch.isfinite(tensor).all()):
            raise InputError(f"the server's adapter has values that are not finite in '{name}'")
    return whole


def written(adapter: Adapter, card: AdapterCard, usage: Usage, site: Path) -> Path:
    """Write it below the site's folder; the one that was there is kept as `adapter-before`.

    Args:
        adapter: of `checked`.
        card: what the folder says of itself.
        usage: how the model is asked.
        site: the site's folder.

    Raises:
        FederationError: the disk refuses.
    """
    place, fresh, before = site / "adapter", site / "adapter.tmp", site / "adapter-before"
    with explained(site, "the final adapter could not be written", "join again"):
        shutil.rmtree(fresh, ignore_errors=True)
        write_adapter(fresh, adapter, card)
        write_usage(fresh, usage)
        if place.exists() and not _same(place, fresh):  # a finished run that is served again sends the same
            shutil.rmtree(before, ignore_errors=True)
            place.replace(before)
        shutil.rmtree(place, ignore_errors=True)
        fresh.replace(place)
    return place


def _same(one: Path, other: Path) -> bool:
    return (one / WEIGHTS).exists() and (one / WEIGHTS).read_bytes() == (other / WEIGHTS).read_bytes()
