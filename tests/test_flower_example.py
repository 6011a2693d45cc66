"""The example app: plain, and with the two lines of docs/flower.md changed; by hand, and with `flwr run` on Ray."""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

pytest.importorskip("flwr", reason="the extra florana[flower] is not installed")

import torch
from flwr.app import ArrayRecord, Context, Message, RecordDict
from peft import get_peft_model_state_dict
from safetensors.torch import load_file

from florana.flower.dropin.names import names_of
from florana.flower.dropin.replies import fingerprint
from florana.lora.factors import Contribution, Update
from florana.strategy import STRATEGIES
from tests.conftest import ROOT
from tests.deployment import environment, simulation
from tests.flower_fake import FakeGrid, identify
from tests.program import HANGS

APP = ROOT / "examples" / "flower_app"
SERVER = Path("lora_app") / "server_app.py"
NODES = [2, 0, 1]  # the node id is the partition, as Flower's simulation numbers partitions from 0
ROUNDS = 2

# PEFT asks transformers by an old name.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")


def two_lines() -> list[tuple[str, str]]:
    """The pairs (line taken out, line put in) of the first diff in docs/flower.md."""
    block = (ROOT / "docs" / "flower.md").read_text().split("```diff\n")[1].split("```")[0].splitlines()
    return [(old[1:], new[1:]) for old, new in zip(block[::2], block[1::2], strict=True)]


@pytest.fixture
def apps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Path, Path]]:
    """The app as it is, and a copy with the two lines changed."""
    plain, changed = tmp_path / "plain", tmp_path / "changed"
    for folder in (plain, changed):
        shutil.copytree(APP, folder, ignore=shutil.ignore_patterns("__pycache__"))
    text = (changed / SERVER).read_text()
    for old, new in two_lines():
        assert text.count(old + "\n") == 1
        text = text.replace(old + "\n", new + "\n")
    (changed / SERVER).write_text(text)
    monkeypatch.syspath_prepend(str(plain))
    identify()
    yield plain, changed
    for name in [name for name in sys.modules if name.split(".")[0] == "lora_app"]:
        del sys.modules[name]


def test_the_two_apps_differ_in_two_lines(apps: tuple[Path, Path]) -> None:
    assert len(two_lines()) == 2
    differing = 0
    for path in sorted(path for path in apps[0].rglob("*") if path.is_file()):
        one, other = path.read_text().splitlines(), (apps[1] / path.relative_to(apps[0])).read_text().splitlines()
        assert len(one) == len(other)
        differing += sum(a != b for a, b in zip(one, other, strict=True))
    assert differing == 2
    assert not list(APP.rglob("*.safetensors")), "no weights in an app"


def config(save_to: Path) -> dict[str, object]:
    return {
        "num-rounds": ROUNDS,
        "fraction-train": 1.0,
        "local-steps": 3,
        "learning-rate": 0.05,
        "save-to": str(save_to),
    }


def client(message: Message) -> list[Message]:
    """One of the app's own clients, in this process."""
    from lora_app.client_app import app

    node = message.metadata.dst_node_id
    own = Context(1, node, {"partition-id": node}, RecordDict(), config(Path()))
    return [app(message, own)]


def by_hand(folder: Path) -> dict[str, torch.Tensor]:
    """The app's server over a fake grid; what it saved."""
    place = importlib.util.spec_from_file_location("lora_app_server", folder / SERVER)
    assert place is not None
    assert place.loader is not None
    module: ModuleType = importlib.util.module_from_spec(place)
    place.loader.exec_module(module)
    saved = folder / "saved.safetensors"
    module.app(FakeGrid(client, NODES), Context(1, 1, {}, RecordDict(), config(saved)))
    return load_file(saved)


def own_arithmetic(method: str) -> dict[str, torch.Tensor]:
    """The rounds of the app with `strategy.step` alone."""
    from lora_app.task import ALPHA, make_model

    sent = get_peft_model_state_dict(make_model())
    names = names_of(sent)
    strategy = STRATEGIES[method]()
    state = strategy.init(names.adapter(sent, lambda module, rank: ALPHA / rank))
    for _ in range(ROUNDS):
        arrays = ArrayRecord(names.record_names(state.adapter))
        updates = []
        for node in NODES:
            answer = client(Message(RecordDict({"arrays": arrays}), node, "train"))[0].content
            adapter = names.adapter(answer["arrays"].to_torch_state_dict(), lambda module, rank: ALPHA / rank)
            updates.append(Update(str(node), 1, adapter, int(answer["metrics"]["num-examples"]), {}))
        total = sum(update.examples for update in updates)
        parts = [Contribution(u.client, u.adapter, u.examples / total) for u in sorted(updates, key=fingerprint)]
        state = strategy.step(state, parts).state
    return names.record_names(state.adapter)


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def test_both_apps_run_and_the_changed_one_is_floranas_own_arithmetic(apps: tuple[Path, Path]) -> None:
    """The plain app is FedIT to rounding; the changed one is FLoRA-NA, bit for bit."""
    plain, changed = by_hand(apps[0]), by_hand(apps[1])
    for key, tensor in own_arithmetic("fedit").items():
        assert torch.allclose(plain[key], tensor, atol=1e-6)
    assert same(changed, own_arithmetic("flora-na"))
    assert not same(changed, plain)
    assert not same(changed, own_arithmetic("fedit"))


@pytest.mark.chaos
@pytest.mark.slow
def test_flwr_run_on_ray_gives_the_same_bits(apps: tuple[Path, Path], tmp_path: Path) -> None:
    """The changed app by `flwr run`, on a SuperLink of its own that simulates three nodes."""
    pytest.importorskip("ray", reason="the extra florana[simulation] is not installed")
    home, saved = tmp_path / "home", tmp_path / "saved.safetensors"
    own = {
        **environment(home), "PYTHONPATH": str(Path(florana_folder()).parent), "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0"
    }  # fmt: skip
    wanted = " ".join(f'{key}="{value}"' if isinstance(value, str) else f"{key}={value}" for key, value in
                      config(saved).items())  # fmt: skip
    with simulation(home, own) as log:
        done = subprocess.run(
            ["flwr", "run", str(apps[1]), "own", "--stream", "--run-config", wanted,
             "--federation-config", "num-supernodes=3 client-resources-num-cpus=1"],
            env=own, cwd=tmp_path, capture_output=True, text=True, timeout=HANGS,
        )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert saved.exists(), done.stdout + log.read_text()[-3000:]
    assert "florana-error" in done.stdout
    assert same(load_file(saved), own_arithmetic("flora-na"))


def florana_folder() -> str:
    import florana

    return str(Path(str(florana.__file__)).parent)
