"""Small contents that would take a parser all memory, or end in what nobody catches: of files that florana keeps, of
invitations and rosters that are handed over, of what comes over the wire, of models."""

from __future__ import annotations

import json
import shutil
import struct
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("flwr", reason="the extra 'flower' is not installed")

from florana.dp.ledger import Ledger
from florana.errors import FloranaError, InputError
from florana.federation.journal import Journal, read_records
from florana.federation.messages import unpack_whole
from florana.federation.round_record import RoundRecord
from florana.flower.app.frames import Frame, from_head
from florana.flower.deploy.audit_log import read_log
from florana.flower.deploy.invitation import read_invitation
from florana.flower.deploy.kept_update import remembered
from florana.flower.deploy.keys import read_public
from florana.flower.deploy.quota import Quota
from florana.flower.deploy.roster import read_roster
from florana.recipe.load import read_recipe
from florana.recipe.usage import USAGE, read_usage
from florana.report.live_study import live_study_of
from florana.runs.completions import last_completions
from florana.runs.run_folder import read_environment, read_facts, read_run
from florana.study.runner import swapped
from florana.train.gguf_files import dequantized
from florana.train.loading import load_base, load_tokenizer
from florana.train.shapes import shapes_of
from tests.conftest import ROOT
from tests.test_bombs import HEADERS

DEEP = 100_000
TEXTS: dict[str, bytes] = {
    "nested lists": b"[" * DEEP + b"]" * DEEP,
    "nested objects": b'{"a":' * DEEP + b"1" + b"}" * DEEP,
    "lists without an end": b"[" * DEEP,
    "a large number": b'{"round": ' + b"9" * DEEP + b"}",
    "no text": b"\xff\xfe\x00" * 1000,
}


@pytest.fixture(autouse=True)
def soon() -> Iterator[None]:
    started = time.process_time()
    yield
    assert time.process_time() - started < 10


def put(path: Path, content: bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


def records(folder: Path, text: bytes) -> object:
    return read_records(put(folder / "rounds.jsonl", text + b"\n{}\n{}\n"))


def checkpoint(folder: Path, text: bytes) -> object:
    put(folder / "checkpoint" / "round-000001" / "state.json", text)
    return Journal(folder, None).kept()  # type: ignore[arg-type]


def run(folder: Path, text: bytes) -> object:
    put(folder / "recipe.toml", (ROOT / "recipes" / "sst2-minilm.toml").read_bytes())
    put(folder / "setup.json", text)
    return read_run(folder)


def environment(folder: Path, text: bytes) -> object:
    put(folder / "environment.json", text)
    return read_environment(folder)


def ledger(folder: Path, text: bytes) -> object:
    return Ledger(put(folder / "ledger.jsonl", text + b"\n")).charges()


def usage(folder: Path, text: bytes) -> object:
    put(folder / USAGE, text)
    return read_usage(folder)


def study(folder: Path, text: bytes) -> object:
    put(folder / "study.json", text)
    return live_study_of(folder, 1)


def completions(folder: Path, text: bytes) -> object:
    put(folder / "completions" / "round-1.jsonl", text + b"\n")
    return last_completions(folder, 3)


READERS: dict[str, Callable[[Path, bytes], object]] = {
    "rounds": records,
    "checkpoint": checkpoint,
    "setup": run,
    "facts": lambda folder, text: read_facts(put(folder / "facts.json", text)),
    "environment": environment,
    "ledger": ledger,
    "usage": usage,
    "study": study,
    "completions": completions,
}


@pytest.mark.parametrize("kind", TEXTS)
@pytest.mark.parametrize("reader", READERS)
def test_files_of_runs(reader: str, kind: str, tmp_path: Path) -> None:
    with pytest.raises(InputError):
        READERS[reader](tmp_path, TEXTS[kind])


RECORD: dict[str, Any] = RoundRecord(
    1, "fedit", ["a"], {}, {"a": 3}, {"a": 1.0}, 0.5, {"global": {"loss": 1.0}}, 9, 9, 0.1, 0.1, {"overall": 0.2}
).to_json()
SETUP: dict[str, Any] = {
    "labels": ["x", "y"],
    "clients": {"a": {"train": 3}},
    "start": None,
    "trainable_parameters": 5,
    "base_parameters": 9,
}


def with_files(folder: Path, record: Mapping[str, Any], setup: Mapping[str, Any]) -> Path:
    put(folder / "recipe.toml", (ROOT / "recipes" / "sst2-minilm.toml").read_bytes())
    put(folder / "setup.json", json.dumps(setup).encode())
    lines = "".join(json.dumps(one) + "\n" for one in (record, RECORD, RECORD))
    return put(folder / "rounds.jsonl", lines.encode()).parent


@pytest.mark.parametrize("name", RECORD)
def test_a_field_of_a_round_that_is_of_another_kind_is_named(name: str, tmp_path: Path) -> None:
    assert read_run(with_files(tmp_path, RECORD, SETUP))[2][0].to_json() == RECORD
    kinds: list[Any] = [5, "x", None, [], {}, [5], {"a": 5}]
    own = RECORD[name]
    for value in kinds:
        like = type(value) is type(own) or (isinstance(own, float) and isinstance(value, int))
        if like or (name == "train_loss" and value is None):
            continue
        with pytest.raises(InputError, match=r"rounds.jsonl, line 1 cannot be read"):
            read_run(with_files(tmp_path, {**RECORD, name: value}, SETUP))
    if name not in ("notes", "traffic"):
        with pytest.raises(InputError, match=name):
            read_run(with_files(tmp_path, {key: value for key, value in RECORD.items() if key != name}, SETUP))
    with pytest.raises(InputError, match=r"line 1 cannot be read"):
        read_run(with_files(tmp_path, {**RECORD, "eval": {"global": 5}, "more": 1}, SETUP))
    for wrong in ({"eval": {"global": 5}}, {"error": {}}):
        with pytest.raises(InputError, match=r"line 1 cannot be read"):
            read_run(with_files(tmp_path, {**RECORD, **wrong}, SETUP))


@pytest.mark.parametrize("name", SETUP)
def test_a_value_of_a_setup_that_is_of_another_kind_is_named(name: str, tmp_path: Path) -> None:
    for value in ("x", 1.5, [{}], {"a": 5}):
        if type(value) is not type(SETUP[name]) and not (name == "start" and isinstance(value, dict)):
            with pytest.raises(InputError, match=rf"setup.json is not what florana writes[^§]*{name}"):
                read_run(with_files(tmp_path, RECORD, {**SETUP, name: value}))
    with pytest.raises(InputError, match="of clients"):
        read_run(with_files(tmp_path, RECORD, {**SETUP, "clients": {"a": 5}}))


@pytest.mark.parametrize("change", ["federation = 5", "[federation]\nrounds = 'x'", "[fedration]\nrounds = 3", ""])
def test_a_recipe_in_a_run_folder_that_is_none_is_named(change: str, tmp_path: Path) -> None:
    folder = with_files(tmp_path, RECORD, SETUP)
    put(folder / "recipe.toml", change.encode())
    with pytest.raises(InputError, match="cannot be read"):
        read_run(folder)


def test_a_run_folder_is_read_without_running_anything_of_it(tmp_path: Path) -> None:
    """A strategy of one's own is a file of Python: reading somebody's run must not load it."""
    folder, mark = with_files(tmp_path, RECORD, SETUP), tmp_path / "mark"
    put(folder / "own.py", f"open({str(mark)!r}, 'w')\n".encode())
    text = (folder / "recipe.toml").read_text()
    begun, _, rest = text.partition("[strategy]\nname = ")
    put(
        folder / "recipe.toml",
        f'{begun}[strategy]\nname = "{folder}/own.py:rule"\n{rest.partition(chr(10))[2]}'.encode(),
    )
    assert read_run(folder)[0]["strategy"]["name"].endswith("own.py:rule")
    assert not mark.exists()


@pytest.mark.parametrize("text", [*TEXTS.values(), b"", b"[]", b"5", b'{"asked": "x"}', b'{"asked": "x", "rows": 3}'])
def test_an_ablation_of_a_study_that_is_damaged_is_made_anew(text: bytes, tmp_path: Path) -> None:
    assert swapped(put(tmp_path / "swap.json", b'{"asked": "x", "rows": []}'), "x")
    assert not swapped(put(tmp_path / "swap.json", text), "x")
    assert not swapped(tmp_path / "none.json", "x")


def gguf(*, version: int = 3, tensors: int = 0, keys: int = 0, rest: bytes = b"") -> bytes:
    return b"GGUF" + struct.pack("<IQQ", version, tensors, keys) + rest


def name_of(length: int, text: bytes = b"") -> bytes:
    return struct.pack("<Q", length) + text


MODELS: dict[str, bytes] = {
    "empty": b"",
    "no GGUF": b"\x00" * 1000,
    "a header alone": gguf(),
    "cut off": gguf(keys=3),
    "of many keys": gguf(keys=2**60),
    "of many tensors": gguf(tensors=2**60),
    "of a long name": gguf(keys=1, rest=name_of(2**60)),
    "of a long text": gguf(keys=1, rest=name_of(1, b"k") + struct.pack("<I", 8) + name_of(2**60)),
    "of a long list": gguf(keys=1, rest=name_of(1, b"k") + struct.pack("<IIQ", 9, 4, 2**60)),
    "of lists in lists": gguf(keys=1, rest=name_of(1, b"k") + struct.pack("<I", 9) + struct.pack("<IQ", 9, 1) * 20_000),
    "of a tensor of many dimensions": gguf(tensors=1, rest=name_of(1, b"t") + struct.pack("<I", 2**31)),
    "of a huge tensor": gguf(tensors=1, rest=name_of(1, b"t") + struct.pack("<IQQIQ", 2, 2**40, 2**40, 0, 0)),
    "of another version": gguf(version=2**31),
}


@pytest.mark.parametrize("kind", MODELS)
def test_models_in_one_file(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("gguf")
    monkeypatch.setenv("FLORANA_CACHE", str(tmp_path / "cache"))
    with pytest.raises(InputError):
        dequantized(put(tmp_path / "model.gguf", MODELS[kind]), "model.gguf")


@pytest.mark.parametrize("kind", TEXTS)
def test_folders_of_models(kind: str, tmp_path: Path) -> None:
    put(tmp_path / "config.json", TEXTS[kind])
    with pytest.raises(InputError):
        shapes_of(str(tmp_path), ("q",), "causal-lm")
    put(tmp_path / "tokenizer.json", TEXTS[kind])
    with pytest.raises(InputError):
        load_tokenizer(str(tmp_path), str(tmp_path))


def invitation(folder: Path, text: bytes) -> object:
    return read_invitation(put(folder / "federation.toml", text).parent)


def authority(folder: Path, text: bytes) -> object:
    put(folder / "federation.toml", b'host = "localhost"\nport = 1\n')
    put(folder / "recipe.toml", b"")
    put(folder / "ca.crt", b"-----BEGIN CERTIFICATE-----\n" + text * 20)
    return read_invitation(folder)


HANDED: dict[str, Callable[[Path, bytes], object]] = {
    "roster": lambda folder, text: read_roster(put(folder / "roster.json", text)),
    "public key": lambda folder, text: read_public(put(folder / "a.pub", b"ecdsa-sha2-nistp384 " + text + b" a")),
    "audit log": lambda folder, text: read_log(put(folder / "audit.jsonl", text + b"\n")),
    "quota": lambda folder, text: Quota(put(folder / "trainings.json", text), 1).take(),
    "invitation": invitation,
    "authority": authority,
}


@pytest.mark.parametrize("kind", TEXTS)
@pytest.mark.parametrize("reader", HANDED)
def test_files_of_a_federation(reader: str, kind: str, tmp_path: Path) -> None:
    with pytest.raises(InputError):
        HANDED[reader](tmp_path, TEXTS[kind])


@pytest.mark.parametrize("kind", TEXTS)
def test_heads_of_messages_and_answers_that_were_kept(kind: str, tmp_path: Path) -> None:
    text = TEXTS[kind].decode("latin-1")
    with pytest.raises(ValueError, match=r"."):
        from_head(text, b"")
    kept = put(tmp_path / "answer", TEXTS[kind] + b"\n")
    made = remembered(lambda frame: Frame("reply", {"made": 1}), Frame("train", {}), kept)
    assert made.fields["made"] == 1  # one that cannot be read is trained anew


def test_a_model_folder_runs_no_code_of_its_own(tiny_bert: Path, tmp_path: Path) -> None:
    """Transformers asks whoever sits at the terminal whether it should; a recipe's writer is somebody else."""
    folder, mark = tmp_path / "model", tmp_path / "mark"
    shutil.copytree(tiny_bert, folder)
    put(folder / "own.py", f"open({str(mark)!r}, 'w')\nclass Own: pass\n".encode())
    config = json.loads((folder / "config.json").read_text())
    names = {"AutoConfig": "own.Own", "AutoModel": "own.Own", "AutoModelForSequenceClassification": "own.Own"}
    put(folder / "config.json", json.dumps({**config, "model_type": "own", "auto_map": names}).encode())
    put(folder / "tokenizer_config.json", json.dumps({"auto_map": {"AutoTokenizer": ["own.Own", None]}}).encode())
    settings = read_recipe(ROOT / "recipes" / "sst2-minilm.toml").model
    for load in (
        lambda: shapes_of(str(folder), ("query",), "sequence-classification"),
        lambda: load_tokenizer(str(folder), str(folder)),
        lambda: load_base(str(folder), settings, "sequence-classification", 2, torch.device("cpu")),
    ):
        with pytest.raises(InputError, match="brings program code of its own"):
            load()
    assert not mark.exists()


@pytest.mark.parametrize("kind", HEADERS)
def test_tensors_over_the_wire(kind: str) -> None:
    with pytest.raises(FloranaError):
        unpack_whole(HEADERS[kind], {})
