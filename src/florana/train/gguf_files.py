"""Base models in GGUF files: dequantised once by Transformers' reader, kept as an ordinary folder by the file's digest.

    file (sha256) -> CACHE/gguf/DIGEST-transformers-VERSION/{config.json, model.safetensors, tokenizer.json, ...}

The folder holds float32 weights, which every quantised value fits into, and is all that the rest of florana sees.
CACHE is FLORANA_CACHE, else XDG_CACHE_HOME/florana, else ~/.cache/florana.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import shutil
import tempfile
from pathlib import Path

import torch
import transformers
from filelock import FileLock

from florana.errors import InputError


def is_gguf(base: str) -> bool:
    """Whether a model's name ends in a GGUF file.

    Examples:
        >>> is_gguf("owner/repository/model.Q4_1.gguf"), is_gguf("owner/repository")
        (True, False)
    """
    return base.lower().endswith(".gguf")


def dequantized(file: Path, base: str) -> Path:
    """The folder of a GGUF file's weights as float32, made where the cache does not have it yet.

    Args:
        file: the GGUF file.
        base: as the recipe names it, for messages.

    Raises:
        InputError: there is no such file, the package gguf is missing, Transformers cannot read this kind of model, or
            the cache cannot be written.
    """
    if not file.is_file():
        raise InputError(f"model.base is '{base}', but there is no file {file}")
    if importlib.util.find_spec("gguf") is None:
        raise InputError(f"reading '{base}' needs the package gguf", fix="pip install 'florana[gguf]'")
    place = cache() / "gguf" / f"{_digest(file)[:32]}-transformers-{transformers.__version__}"
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{place}.lock"):
            if not (place / "config.json").is_file():
                _convert(file, place, base)
    except OSError as error:
        raise InputError(
            f"the weights of '{base}' cannot be kept in {place.parent}",
            why=error.strerror or str(error),
            fix="set FLORANA_CACHE to a folder that can be written to",
        ) from None
    return place


def cache() -> Path:
    """Where florana keeps what it can make again."""
    if own := os.environ.get("FLORANA_CACHE"):
        return Path(own).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "florana"


def fetched(base: str) -> Path:
    """The file of OWNER/REPOSITORY/FILE.gguf, from the hub's own cache or the hub. Raises InputError."""
    from huggingface_hub import hf_hub_download

    owner, repository, *inside = base.split("/")
    try:
        return Path(hf_hub_download(f"{owner}/{repository}", "/".join(inside)))
    except Exception as error:  # no connection, no such file, no right to it
        raise InputError(
            f"the file '{base}' could not be had from the hub",
            why=f"{type(error).__name__}: {error}".splitlines()[0],
            fix="check the name, OWNER/REPOSITORY/FILE.gguf; without a connection, give a file on this machine",
        ) from None


def _convert(file: Path, place: Path, base: str) -> None:
    """Write the folder beside its place, and put it there whole."""
    scratch = Path(tempfile.mkdtemp(prefix=".making-", dir=place.parent))
    try:
        try:
            model = transformers.AutoModelForCausalLM.from_pretrained(
                file.parent, gguf_file=file.name, dtype=torch.float32, trust_remote_code=False
            )
            tokenizer = transformers.AutoTokenizer.from_pretrained(
                file.parent, gguf_file=file.name, trust_remote_code=False
            )
        except Exception as error:  # of an unknown architecture, a damaged header, a quantisation that it cannot read
            raise InputError(
                f"Transformers cannot read the GGUF file '{base}'",
                why=f"{type(error).__name__}: {error}".splitlines()[0],
                fix="give a model folder, or a GGUF file of a kind that Transformers' documentation lists",
            ) from None
        model.hf_quantizer = None  # the weights are plain from here on
        if hasattr(model.config, "quantization_config"):
            del model.config.quantization_config
        model.save_pretrained(scratch)
        tokenizer.save_pretrained(scratch)
        scratch.replace(place)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _digest(file: Path) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()
