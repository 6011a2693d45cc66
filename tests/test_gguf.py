"""A base model in a GGUF file: dequantised once, the same weights, an ordinary folder afterwards."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("gguf", reason="the extra 'gguf' is not installed")

import gguf
from transformers import AutoModelForCausalLM, AutoTokenizer

from florana.errors import InputError
from florana.recipe.load import check
from florana.runs.setup import execute
from florana.train import gguf_files
from florana.train.gguf_files import dequantized, fetched, is_gguf
from florana.train.loading import locate
from florana.train.shapes import shapes_of

WIDTH, HEADS, LAYERS, INNER = 32, 4, 2, 64
WORDS = ["<s>", "</s>", *(chr(code) for code in range(97, 123)), "Ġ", "Ġa", "ab"]


@pytest.fixture(scope="module")
def weights() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    shapes: dict[str, tuple[int, ...]] = {"token_embd.weight": (len(WORDS), WIDTH), "output_norm.weight": (WIDTH,)}
    shapes["output.weight"] = (len(WORDS), WIDTH)
    for layer in range(LAYERS):
        shapes |= {
            f"blk.{layer}.{name}.weight": (WIDTH, WIDTH) for name in ("attn_q", "attn_k", "attn_v", "attn_output")
        }
        shapes |= {f"blk.{layer}.{name}.weight": (WIDTH,) for name in ("attn_norm", "ffn_norm")}
        shapes |= {f"blk.{layer}.{name}.weight": (INNER, WIDTH) for name in ("ffn_gate", "ffn_up")}
        shapes[f"blk.{layer}.ffn_down.weight"] = (WIDTH, INNER)
    return {name: rng.normal(size=shape, scale=0.3).astype(np.float32) for name, shape in shapes.items()}


@pytest.fixture(scope="module")
def file(weights: dict[str, np.ndarray], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama: norms in float32, matrices in Q8_0."""
    path = tmp_path_factory.mktemp("gguf") / "tiny.Q8_0.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(LAYERS)
    writer.add_context_length(64)
    writer.add_embedding_length(WIDTH)
    writer.add_feed_forward_length(INNER)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(WIDTH // HEADS)
    writer.add_vocab_size(len(WORDS))
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(WORDS)
    writer.add_token_types([3, 3, *[1] * (len(WORDS) - 2)])
    writer.add_token_merges(["Ġ a", "a b"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    for name, value in weights.items():
        if value.ndim == 1:
            writer.add_tensor(name, value)
        else:
            packed = gguf.quants.quantize(value, gguf.GGMLQuantizationType.Q8_0)
            writer.add_tensor(name, packed, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("FLORANA_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_the_folder_holds_what_the_file_holds(file: Path, weights: dict[str, np.ndarray], own_cache: Path) -> None:
    place = dequantized(file, "tiny")
    assert place.is_relative_to(own_cache / "gguf")
    model = AutoModelForCausalLM.from_pretrained(place)
    assert not hasattr(model.config, "quantization_config")
    wanted = gguf.quants.dequantize(
        gguf.quants.quantize(weights["blk.1.ffn_down.weight"], gguf.GGMLQuantizationType.Q8_0),
        gguf.GGMLQuantizationType.Q8_0,
    )
    stored = model.get_submodule("model.layers.1.mlp.down_proj").weight
    assert stored.dtype == torch.float32
    np.testing.assert_array_equal(stored.detach().numpy(), wanted)
    assert AutoTokenizer.from_pretrained(place)("ab a")["input_ids"]


def test_it_is_made_once_and_again_when_the_file_changes(
    file: Path, tmp_path: Path, own_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = dequantized(file, "tiny")
    monkeypatch.setattr(gguf_files, "_convert", lambda *arguments: pytest.fail("it was converted again"))
    assert dequantized(file, "tiny") == first
    moved = shutil.copy(file, tmp_path / "other-name.gguf")
    assert dequantized(Path(moved), "other") == first
    monkeypatch.undo()
    monkeypatch.setenv("FLORANA_CACHE", str(own_cache))
    changed = tmp_path / "changed.gguf"
    changed.write_bytes(file.read_bytes()[:-1] + b"\x01")
    assert dequantized(changed, "changed") != first


def test_a_run_trains_it(file: Path, recipe_table: dict[str, Any], sentences: Path, tmp_path: Path) -> None:
    recipe_table["task"] = "causal-lm"
    recipe_table["data"] = {"train": str(sentences), "text": "text"}
    recipe_table["model"] |= {"base": str(file), "target_modules": "all-linear"}
    recipe_table["federation"] = {"rounds": 1, "min_clients": 1}
    recipe_table["partition"] = {"kind": "iid", "clients": 2}
    result = execute(check(recipe_table, "t"), tmp_path / "run")
    assert result.records[0].eval["global"]["loss"] > 0
    shapes = shapes_of(str(file), "all-linear")
    assert shapes.modules["layers.0.mlp.down_proj"] == (WIDTH, INNER)


def test_what_cannot_be_read_is_refused_by_name(file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match="there is no file"):
        locate(str(tmp_path / "absent.gguf"))
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(b"GGUF" + bytes(64))
    with pytest.raises(InputError, match="Transformers cannot read the GGUF file"):
        dequantized(broken, "broken.gguf")
    assert not list((tmp_path / "cache" / "gguf").glob(".making-*"))
    unknown = tmp_path / "unknown.gguf"
    unknown.write_bytes(file.read_bytes().replace(b"llama", b"lxyma"))
    with pytest.raises(InputError, match="Transformers cannot read the GGUF file"):
        dequantized(unknown, "unknown.gguf")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"florana\[gguf\]"):
        dequantized(file, "tiny")
    monkeypatch.undo()
    (tmp_path / "a file").write_text("")
    monkeypatch.setenv("FLORANA_CACHE", str(tmp_path / "a file"))
    with pytest.raises(InputError, match="FLORANA_CACHE"):
        dequantized(file, "tiny")


def test_a_name_on_the_hub_is_fetched_by_repository_and_file(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, str]] = []

    def download(repository: str, name: str) -> str:
        asked.append((repository, name))
        return str(file)

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    assert locate("owner/repository/quantised/model.gguf") == str(dequantized(file, "tiny"))
    assert asked == [("owner/repository", "quantised/model.gguf")]
    monkeypatch.setattr("huggingface_hub.hf_hub_download", lambda *names: (_ for _ in ()).throw(OSError("offline")))
    with pytest.raises(InputError, match="could not be had from the hub"):
        fetched("owner/repository/model.gguf")
    assert is_gguf("A.GGUF")
