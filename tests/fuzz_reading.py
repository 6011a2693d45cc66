"""What the bytes of an adapter folder say, by the formats' definitions alone: json and numpy, nothing of florana's."""

from __future__ import annotations

import json
import math
import re
import struct
import warnings
from pathlib import Path
from typing import Any

import numpy as np

from tests.fuzz import CONFIG, INDEX, PREFIX, WEIGHTS, Tensors


def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    assert len(dict(pairs)) == len(pairs), "a key stands twice, and was taken"
    return dict(pairs)


def tensors_of(path: Path) -> Tensors:
    """A safetensors file by the format's definition, in float64; twins and gaps are not forgiven."""
    content = path.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + length].decode("utf-8"), object_pairs_hook=unique)
    header.pop("__metadata__", None)
    body = content[8 + length :]
    tensors: Tensors = {}
    used = 0
    for key, entry in header.items():
        start, end = entry["data_offsets"]
        raw = body[start:end]
        if entry["dtype"] == "BF16":
            values = (np.frombuffer(raw, "<u2").astype("<u4") << 16).view("<f4")
        else:
            values = np.frombuffer(raw, {"F64": "<f8", "F32": "<f4", "F16": "<f2"}[entry["dtype"]])
        tensors[key] = values.reshape(entry["shape"]).astype(np.float64)
        used += end - start
    assert used == len(body), "bytes that no tensor owns, or two do"
    return tensors


def reading(folder: Path) -> tuple[Tensors, dict[str, float], dict[str, Any]]:
    """(tensors by florana's names, scalings, configuration) of a folder that was taken."""
    config = json.loads((folder / CONFIG).read_bytes().decode("utf-8"), object_pairs_hook=unique)
    if (folder / INDEX).exists():
        owner = json.loads((folder / INDEX).read_bytes().decode("utf-8"), object_pairs_hook=unique)["weight_map"]
        raw = {}
        for shard in set(owner.values()):
            found = tensors_of(folder / shard)
            assert {key for key in owner if owner[key] == shard} == set(found), "the index and the shard disagree"
            raw |= found
    else:
        raw = tensors_of(folder / WEIGHTS)
    named: Tensors = {}
    scalings: dict[str, float] = {}
    for key, array in raw.items():
        assert key.startswith(PREFIX)
        name = key[len(PREFIX) :]
        factor = next(
            (
                s
                for s in ("lora_A.weight", "lora_B.weight", "lora_embedding_A", "lora_embedding_B")
                if name.endswith("." + s)
            ),
            None,
        )
        if factor is None:
            assert ".lora_" not in name or name.endswith(".lora_B.bias"), name
            named["extra/" + name] = array
            continue
        module = name[: -len(factor) - 1]
        named[("A/" if "_A" in factor else "B/") + module] = array
        rank, alpha = config["r"], config["lora_alpha"]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for pattern, value in reversed((config.get("rank_pattern") or {}).items()):
                rank = value if re.match(rf"(.*\.)?({pattern})$", module) else rank
            for pattern, value in reversed((config.get("alpha_pattern") or {}).items()):
                alpha = value if re.match(rf"(.*\.)?({pattern})$", module) else alpha
        assert rank == array.shape[0 if "_A" in factor else 1]
        scalings[module] = alpha / math.sqrt(rank) if config.get("use_rslora") is True else alpha / rank
    return named, scalings, config
