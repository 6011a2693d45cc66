"""Damaged adapter folders, made from one good one.

`mutate` writes one damaged folder per call: bytes of the weight file, of its header and of the configuration, their
structure (types, nulls, huge numbers, nesting, twins, patterns), shards and their index, names that lead elsewhere,
links, values that are not finite.
"""

from __future__ import annotations

import json
import math
import random
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
INDEX = WEIGHTS + ".index.json"
PREFIX = "base_model.model."
SHAPES = {"layer.0.q": (4, 3), "layer.1.q": (4, 3), "v": (3, 5)}

Tensors = dict[str, np.ndarray]

GOOD_CONFIG: dict[str, Any] = {
    "alpha_pattern": {"v": 3},
    "base_model_name_or_path": "some/base",
    "bias": "none",
    "fan_in_fan_out": False,
    "lora_alpha": 5,
    "modules_to_save": ["head"],
    "peft_type": "LORA",
    "r": 2,
    "rank_pattern": {"layer.1.q": 1},
    "target_modules": ["q", "v"],
    "task_type": "SEQ_CLS",
    "use_dora": False,
    "use_rslora": False,
}


def good_tensors() -> Tensors:
    rng = np.random.default_rng(7)
    tensors: Tensors = {PREFIX + "head.weight": rng.normal(size=(2, 4)).astype("<f4")}
    for name, (out, into) in SHAPES.items():
        rank = 1 if name == "layer.1.q" else 2
        tensors[f"{PREFIX}{name}.lora_A.weight"] = rng.normal(size=(rank, into)).astype("<f4")
        tensors[f"{PREFIX}{name}.lora_B.weight"] = rng.normal(size=(out, rank)).astype("<f4")
    return tensors


def table_of(tensors: Tensors) -> tuple[dict[str, Any], bytes]:
    header: dict[str, Any] = {}
    body = b""
    for key, array in sorted(tensors.items()):
        end = len(body) + array.nbytes
        header[key] = {"dtype": "F32", "shape": list(array.shape), "data_offsets": [len(body), end]}
        body += array.tobytes()
    return header, body


def packed(header: str | bytes, body: bytes, length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else header.encode("utf-8", "surrogatepass")
    return struct.pack("<Q", (len(text) if length is None else length) % 2**64) + text + body


NUMBERS: list[Any] = [0, -1, 1, 2, 3, 2.0, 2.5, 1e-300, 1e300, 10**30, 10**400, -(10**400), 2**63, True]
VALUES: list[Any] = [
    *NUMBERS, None, False, "", "x", "2", "LORA", "false", [], [1], ["q"], [None], {}, {"q": 1}, {"q": "x"},
    {"q": None}, {"(": 2}, {"[[q]": 2}, {"q{99999999999}": 2}, {".*": 3}, {"layer": 2}, {"q": 10**400},
    "\ud800", "a\nb", ["\ud800"], "é", [[[]]], {"q": {"q": {}}}, "..", "/etc/passwd",
]  # fmt: skip
LITERALS = [
    b"NaN", b"Infinity", b"-Infinity", b"1e999", b"9" * 5000, b"[" * 3000, b'{"a":' * 3000, b"\xff\xfe",
    b"\x00",
]  # fmt: skip
SHARDS: list[Any] = [
    "../outside.safetensors", "/etc/passwd", "..", ".", "", "a/b.safetensors", "a\\b.safetensors",
    "\x00.safetensors", "n" * 5000 + ".safetensors", "none.safetensors", "two.bin", CONFIG, INDEX, None, 3,
    ["one.safetensors"], "\ud800.safetensors", "one.safetensors", "two.safetensors",
]  # fmt: skip
DTYPES = [
    "F64", "F32", "F16", "BF16", "I64", "I32", "U8", "BOOL", "F8_E4M3", "F8_E5M2", "F4", "C64", "f32", "", "X",
    None, 3,
]  # fmt: skip


def any_bytes(rng: random.Random, content: bytes, low: int = 0, high: int | None = None) -> bytes:
    """One byte changed, some put in, some taken out, or the end cut off, between two places."""
    high = len(content) if high is None else high
    place, some = rng.randrange(low, high), rng.randint(1, 9)
    match rng.randrange(5):
        case 0:
            return content[:place]
        case 1:
            return content[:place] + bytes([rng.randrange(256)]) + content[place + 1 :]
        case 2:
            return content[:place] + rng.randbytes(some) + content[place:]
        case 3:
            return content[:place] + content[place + some :]
        case _:
            return content[:place] + bytes([content[place] ^ 1 << rng.randrange(8)]) + content[place + 1 :]


class Folder:
    """The good files, and one folder that is damaged anew each time."""

    def __init__(self, place: Path) -> None:
        self.place = place
        self.folder = place / "adapter"
        self.folder.mkdir()
        self.header, self.body = table_of(good_tensors())
        self.weights = packed(json.dumps(self.header), self.body)
        self.config = json.dumps(GOOD_CONFIG).encode()
        (place / "outside.safetensors").write_bytes(self.weights)
        self.kinds: list[Callable[[random.Random], None]] = [
            self.weight_bytes, self.header_bytes, self.header_length, self.dtype, self.shape, self.offsets,
            self.renamed, self.twin_tensor, self.values, self.config_bytes, self.config_value,
            self.config_literal, self.config_twin, self.shards, self.index_bytes, self.link,
        ]  # fmt: skip

    def mutate(self, rng: random.Random) -> str:
        for path in self.folder.iterdir():
            path.unlink()
        self.write(WEIGHTS, self.weights)
        self.write(CONFIG, self.config)
        kind = rng.choice(self.kinds)
        kind(rng)
        return kind.__name__

    def write(self, name: str, content: bytes) -> None:
        (self.folder / name).write_bytes(content)

    def weight_bytes(self, rng: random.Random) -> None:
        self.write(WEIGHTS, any_bytes(rng, self.weights))

    def header_bytes(self, rng: random.Random) -> None:
        self.write(WEIGHTS, any_bytes(rng, self.weights, 0, 8 + len(json.dumps(self.header))))

    def header_length(self, rng: random.Random) -> None:
        length = rng.choice([0, 1, 7, 2**63, 2**64 - 1, 10**8, len(self.weights), rng.randrange(2000)])
        self.write(WEIGHTS, packed(json.dumps(self.header), self.body, length))

    def entry(self, rng: random.Random, field: str, value: Any) -> None:
        key = rng.choice(list(self.header))
        self.write(WEIGHTS, packed(json.dumps(self.header | {key: self.header[key] | {field: value}}), self.body))

    def dtype(self, rng: random.Random) -> None:
        name, key = rng.choice(DTYPES), rng.choice(list(self.header))
        header = self.header | {key: self.header[key] | {"dtype": name}}
        if rng.random() < 0.5 and name in ("F16", "BF16"):  # and a shape that fits it
            shape = header[key]["shape"]
            header[key] |= {"shape": rng.choice([[shape[0] * 2, shape[1]], [shape[0], shape[1] * 2]])}
        self.write(WEIGHTS, packed(json.dumps(header), self.body))

    def shape(self, rng: random.Random) -> None:
        key = rng.choice(list(self.header))
        shape = self.header[key]["shape"]
        self.entry(
            rng,
            "shape",
            rng.choice(
                [
                    shape[::-1],
                    shape[:1],
                    [],
                    [math.prod(shape)],
                    [1, *shape],
                    [0, 5],
                    [-1, 3],
                    [2**62, 4],
                    [10**30, 1],
                    [2.0, 3],
                    None,
                    "x",
                    [None, 2],
                ]
            ),
        )

    def offsets(self, rng: random.Random) -> None:
        key = rng.choice(list(self.header))
        start, end = self.header[key]["data_offsets"]
        self.entry(
            rng,
            "data_offsets",
            rng.choice(
                [
                    [start, end + 4],
                    [start + 4, end],
                    [end, start],
                    [-4, end],
                    [0, 2**63],
                    [0, 10**30],
                    [start],
                    [start, end, 0],
                    None,
                    [0.0, 4],
                ]
            ),
        )

    def renamed(self, rng: random.Random) -> None:
        key = rng.choice(list(self.header))
        new = rng.choice(
            [
                key + "\n", key + ".", "." + key, key.removeprefix(PREFIX), PREFIX, "", key.replace("A", "B"),
                key.replace("weight", "bias"), key.replace(".weight", ""),
                key.replace("lora_", "lora_embedding_"), key.replace("layer.0", "layer.2"), key.upper(),
                "../" + key, "\x00" + key, PREFIX + "extra",
                key.replace("lora_B.weight", "lora_magnitude_vector"),
            ]
        )  # fmt: skip
        header = {new if name == key else name: entry for name, entry in self.header.items()}
        self.write(WEIGHTS, packed(json.dumps(header), self.body))

    def twin_tensor(self, rng: random.Random) -> None:
        one, other = rng.choices(list(self.header), k=2)  # at times the same twice
        text = json.dumps(self.header)
        entry = json.dumps({one: self.header[other]})
        self.write(WEIGHTS, packed(text[:-1] + ", " + entry[1:], self.body))

    def values(self, rng: random.Random) -> None:
        place = 4 * rng.randrange(len(self.body) // 4)
        value = rng.choice([math.nan, math.inf, -math.inf, 3e38, -0.0, 1e-45, 0.5])
        body = self.body[:place] + struct.pack("<f", value) + self.body[place + 4 :]
        self.write(WEIGHTS, packed(json.dumps(self.header), body))

    def config_bytes(self, rng: random.Random) -> None:
        self.write(CONFIG, any_bytes(rng, self.config))

    def config_value(self, rng: random.Random) -> None:
        key = rng.choice([*GOOD_CONFIG, "lora_bias", "use_qalora", "layers_pattern", "megatron_config"])
        config = GOOD_CONFIG | {key: rng.choice(VALUES)}
        if rng.random() < 0.1:
            del config[key]
        self.write(CONFIG, json.dumps(config).encode())

    def config_literal(self, rng: random.Random) -> None:
        key = json.dumps(rng.choice(list(GOOD_CONFIG))).encode()
        start = self.config.index(key) + len(key) + 2
        end = next(i for i in range(start, len(self.config)) if self.config[i] in b",}")
        self.write(CONFIG, self.config[:start] + rng.choice(LITERALS) + self.config[end:])

    def config_twin(self, rng: random.Random) -> None:
        entry = json.dumps({rng.choice(list(GOOD_CONFIG)): rng.choice(VALUES)}).encode()
        self.write(CONFIG, self.config[:-1] + b", " + entry[1:])

    def sharded(self, rng: random.Random) -> dict[str, Any]:
        """Two shards; which tensors the index places where, rightly."""
        keys = list(self.header)
        rng.shuffle(keys)
        owner = {}
        tensors = good_tensors()
        for name, part in (("one.safetensors", keys[:3]), ("two.safetensors", keys[3:])):
            header, body = table_of({key: tensors[key] for key in part})
            self.write(name, packed(json.dumps(header), body))
            owner |= dict.fromkeys(part, name)
        (self.folder / WEIGHTS).unlink()
        return owner

    def shards(self, rng: random.Random) -> None:
        owner = self.sharded(rng)
        key = rng.choice(list(owner))
        match rng.randrange(7):
            case 0:
                owner[key] = rng.choice(SHARDS)
            case 1:
                del owner[key]
            case 2:
                owner[key + "x"] = owner.pop(key)
            case 3:
                owner = dict.fromkeys(owner, rng.choice(SHARDS))
            case 4:  # a tensor that no file holds
                owner[key + "x"] = owner[key]
            case 5:
                (self.folder / rng.choice(["one.safetensors", "two.safetensors"])).write_bytes(self.weights)
            case _:
                owner = {name: file for name, file in owner.items() if file != owner[key]}
        table: Any = {"weight_map": owner}
        if rng.random() < 0.2:
            table = rng.choice(
                [owner, [owner], {"weight_map": list(owner)}, {"weight_map": None}, {"weight_map": {}}, 3]
            )
        self.write(INDEX, json.dumps(table).encode())

    def index_bytes(self, rng: random.Random) -> None:
        self.write(INDEX, any_bytes(rng, json.dumps({"weight_map": self.sharded(rng)}).encode()))

    def link(self, rng: random.Random) -> None:
        name = rng.choice([WEIGHTS, CONFIG])
        (self.folder / name).unlink()
        target = rng.choice([name, "none", "..", "/dev/null", "/dev/zero", str(self.place / "outside.safetensors")])
        (self.folder / name).symlink_to(target)
