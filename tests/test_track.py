"""`--track`: each committed round once, in the libraries' own files; a tracker that fails changes no run.

TensorBoard is really there, and its files are read back. Weights & Biases and MLflow are too heavy for this
environment: what florana asks of them is recorded by a fake of their public functions (seen with wandb 0.31 and mlflow
3.17 themselves).
"""

from __future__ import annotations

import getpass
import json
import math
import os
import socket
import sys
import types
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from florana.cli.extras import missing
from florana.cli.main import app
from florana.federation.event import Event
from florana.federation.journal import read_records
from florana.recipe.schema import Recipe
from florana.runs.prepared import prepare
from florana.runs.setup import execute
from florana.track.round_figures import figures_of, settings_of
from florana.track.tracking import Tracking, require_trackers, tracked, tracked_study

Told = list[str]


@pytest.fixture(scope="module")
def nothing() -> Callable[[Event], None]:
    return lambda event: None


def scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """Every scalar of an event folder, as TensorBoard itself reads it."""
    event_accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    read = event_accumulator.EventAccumulator(str(folder)).Reload()
    return {tag: [(one.step, one.value) for one in read.Scalars(tag)] for tag in read.Tags()["scalars"]}


@pytest.fixture
def short(recipe: Recipe) -> Recipe:
    return recipe.model_copy(update={"federation": recipe.federation.model_copy(update={"rounds": 2})})


def test_tensorboard_has_each_round_once_also_after_a_resume(
    recipe: Recipe, short: Recipe, tmp_path: Path, nothing: Callable[[Event], None]
) -> None:
    pytest.importorskip("tensorboard")
    said: Told = []
    setup, folder = prepare(recipe), tmp_path / "run"
    with tracked(folder, ["tensorboard"], nothing, said.append) as show:
        execute(short, folder, setup=setup, show=show)
    with tracked(folder, ["tensorboard"], nothing, said.append) as show:
        execute(recipe, folder, setup=setup, resume=True, show=show)
    assert said == []
    records = read_records(folder / "rounds.jsonl")
    found = scalars(folder / "track" / "tensorboard")
    assert set(found) == {name for record in records for name in figures_of(record)}
    assert {"global/accuracy", "personal/loss", "train_loss", "error/overall", "bytes/up", "clients/refused"} <= set(
        found
    )
    for name, series in found.items():
        expected = [(r.round, figures_of(r)[name]) for r in records if name in figures_of(r)]
        assert [step for step, _ in series] == [step for step, _ in expected], name
        assert [value for _, value in series] == pytest.approx([value for _, value in expected], rel=1e-6)
    names = [path.name for path in (folder / "track" / "tensorboard").iterdir()]
    assert not [name for name in names if socket.gethostname() in name]


def test_a_round_that_a_kill_left_out_is_caught_up(
    recipe: Recipe, short: Recipe, tmp_path: Path, nothing: Callable[[Event], None]
) -> None:
    pytest.importorskip("tensorboard")
    setup, folder = prepare(recipe), tmp_path / "run"
    execute(short, folder, setup=setup)
    with tracked(folder, ["tensorboard"], nothing, pytest.fail) as show:
        execute(recipe, folder, setup=setup, resume=True, show=show)
    assert [step for step, _ in scalars(folder / "track" / "tensorboard")["bytes/up"]] == [1, 2, 3]


def test_a_round_written_but_not_noted_before_a_kill_is_read_once(recipe: Recipe, tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    folder = tmp_path / "run"
    execute(recipe, folder)
    tracking = Tracking(folder, folder, "", ["tensorboard"], pytest.fail)
    tracking.look()
    tracking.close()
    marker = folder / "track" / "tensorboard" / "logged.json"
    marker.write_text(json.dumps({**json.loads(marker.read_text()), "round": 1}))
    again = Tracking(folder, folder, "", ["tensorboard"], pytest.fail)
    again.look()
    again.close()
    assert [step for step, _ in scalars(folder / "track" / "tensorboard")["bytes/up"]] == [1, 2, 3]


class Broken:
    """A tracker whose library fails where the test says so."""

    fails = "log"

    def __init__(self, *args: Any) -> None:
        if self.fails == "open":
            raise OSError("no\nsuch \x1b[2J server")

    def keeps(self) -> Mapping[str, str]:
        return {}

    def log(self, round_: int, figures: Mapping[str, float]) -> None:
        if self.fails == "log":
            raise RuntimeError("the disk of the tracker is full")

    def finish(self) -> None:
        raise RuntimeError("gone")


@pytest.mark.parametrize("fails", ["open", "log", "finish"])
def test_a_tracker_that_fails_is_one_line_and_the_run_is_the_same(
    fails: str, recipe: Recipe, tmp_path: Path, nothing: Callable[[Event], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    module = types.ModuleType("florana.track.wandb")
    module.WandbTracker = Broken  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "florana.track.wandb", module)
    monkeypatch.setattr(Broken, "fails", fails)
    said: Told = []
    setup = prepare(recipe)
    execute(recipe, tmp_path / "alone", setup=setup)
    with tracked(tmp_path / "run", ["wandb"], nothing, said.append) as show:
        execute(recipe, tmp_path / "run", setup=setup, show=show)
    assert len(said) == 1
    assert said[0].startswith("tracking by wandb has ended, the run goes on: ")
    assert "\n" not in said[0]
    assert "\x1b" not in said[0]
    for name in ("state.safetensors", "clients.safetensors"):
        states = [(tmp_path / one / "checkpoint" / "round-000003" / name).read_bytes() for one in ("alone", "run")]
        assert states[0] == states[1]
    inside = {path.name for path in (tmp_path / "run" / "checkpoint" / "round-000003").iterdir()}
    assert inside == {"state.safetensors", "clients.safetensors", "state.json"}


@pytest.fixture
def fake_wandb(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, Any]]:
    """wandb's `init`, `Settings` and run, recorded."""
    calls: list[tuple[str, Any]] = []

    class Run:
        def log(self, data: Mapping[str, Any], step: int) -> None:
            calls.append(("log", (step, dict(data))))

        def finish(self) -> None:
            calls.append(("finish", None))

    def init(**options: Any) -> Run:
        calls.append(("init", options))
        return Run()

    fake = types.ModuleType("wandb")
    fake.init, fake.Settings = init, lambda **options: options  # type: ignore[attr-defined]
    fake.__spec__ = types.SimpleNamespace(name="wandb")  # type: ignore[assignment]
    monkeypatch.setitem(sys.modules, "wandb", fake)
    monkeypatch.delitem(sys.modules, "florana.track.wandb", raising=False)
    monkeypatch.delenv("WANDB_MODE", raising=False)
    return calls


def test_wandb_is_offline_once_per_round_and_tells_nothing_of_the_machine(
    recipe: Recipe,
    short: Recipe,
    tmp_path: Path,
    nothing: Callable[[Event], None],
    fake_wandb: list[tuple[str, Any]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    setup, folder = prepare(recipe), tmp_path / "run"
    with tracked(folder, ["wandb"], nothing, pytest.fail) as show:
        execute(short, folder, setup=setup, show=show)
    monkeypatch.setenv("WANDB_MODE", "online")
    with tracked(folder, ["wandb"], nothing, pytest.fail) as show:
        execute(recipe, folder, setup=setup, resume=True, show=show)
    assert [call for call, _ in fake_wandb] == ["init", "log", "log", "finish", "init", "log", "finish"]
    assert [value[0] for call, value in fake_wandb if call == "log"] == [1, 2, 3]
    first, second = (options for call, options in fake_wandb if call == "init")
    assert (first["mode"], second["mode"]) == ("offline", "online")
    assert first["id"] == second["id"]
    assert (first["resume"], second["resume"]) == (None, "allow")
    assert first["config"]["model.rank"] == 2
    assert Path(first["dir"]) == folder / "track" / "wandb"
    settings = first["settings"]
    assert settings["host"] == "-"
    assert settings["x_disable_meta"] is settings["x_disable_machine_info"] is settings["disable_git"] is True
    assert settings["save_code"] is settings["x_save_requirements"] is False


def test_mlflow_keeps_a_file_has_each_round_once_and_names_no_user(
    recipe: Recipe, short: Recipe, tmp_path: Path, nothing: Callable[[Event], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    metrics: dict[str, list[types.SimpleNamespace]] = {}
    params: dict[str, str] = {}
    calls: list[tuple[Any, ...]] = []

    class Client:
        def __init__(self, uri: str) -> None:
            calls.append(("client", uri))

        def get_experiment_by_name(self, name: str) -> None:
            return None

        def create_experiment(self, name: str, artifact_location: str) -> str:
            calls.append(("experiment", artifact_location))
            return "7"

        def create_run(self, experiment_id: str, **options: Any) -> Any:
            calls.append(("run", experiment_id, options))
            return types.SimpleNamespace(info=types.SimpleNamespace(run_id="r1"))

        def update_run(self, run_id: str, status: str) -> None:
            calls.append(("update", run_id, status))

        def get_metric_history(self, run_id: str, key: str) -> list[types.SimpleNamespace]:
            return metrics[key]

        def log_batch(self, run_id: str, metrics: Any = (), params: Any = ()) -> None:
            assert run_id == "r1"
            for key, value, _, step in metrics:
                kept.setdefault(key, []).append(types.SimpleNamespace(step=step, value=value))
            own.update(params)

        def set_terminated(self, run_id: str) -> None:
            calls.append(("terminated", run_id))

    kept, own = metrics, params
    for name in ("mlflow", "mlflow.entities", "mlflow.tracking"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    sys.modules["mlflow.entities"].Metric = lambda *values: values  # type: ignore[attr-defined]
    sys.modules["mlflow.entities"].Param = lambda *values: values  # type: ignore[attr-defined]
    sys.modules["mlflow.tracking"].MlflowClient = Client  # type: ignore[attr-defined]
    monkeypatch.delitem(sys.modules, "florana.track.mlflow", raising=False)
    monkeypatch.delenv("MLFLOW_DISABLE_TELEMETRY", raising=False)
    setup, folder = prepare(recipe), tmp_path / "run"
    with tracked(folder, ["mlflow"], nothing, pytest.fail) as show:
        execute(short, folder, setup=setup, show=show)
    marker = folder / "track" / "mlflow" / "logged.json"
    marker.write_text(json.dumps({"round": 1, "kept": {"run_id": "r1"}}))  # a kill before the note
    with tracked(folder, ["mlflow"], nothing, pytest.fail) as show:
        execute(recipe, folder, setup=setup, resume=True, show=show)
    assert [one.step for one in metrics["bytes/up"]] == [1, 2, 3]
    assert params["model.rank"] == "2"
    assert calls[0] == ("client", f"sqlite:///{folder / 'track' / 'mlflow' / 'mlflow.db'}")
    assert [call[0] for call in calls] == [
        "client",
        "experiment",
        "run",
        "terminated",
        "client",
        "update",
        "terminated",
    ]
    assert calls[2] == ("run", "7", {"run_name": "run"})
    assert os.environ["MLFLOW_DISABLE_TELEMETRY"] == "true"
    monkeypatch.delitem(sys.modules, "florana.track.mlflow")


def test_a_study_has_a_run_for_each_cell(recipe: Recipe, tmp_path: Path, fake_wandb: list[tuple[str, Any]]) -> None:
    cells = {f"as-recipe/seed-{seed}/fedit": tmp_path / "runs" / str(seed) for seed in (0, 1)}
    setup = prepare(recipe)
    with tracked_study(tmp_path, cells, 3, ["wandb"], pytest.fail) as look:
        for folder in cells.values():
            execute(recipe, folder, setup=setup, show=lambda event: look() if event.kind == "committed" else None)
    assert [options["name"] for call, options in fake_wandb if call == "init"] == list(cells)
    assert [call for call, _ in fake_wandb] == ["init", "log", "log", "log", "finish"] * 2
    assert (tmp_path / "track" / "wandb" / "as-recipe/seed-1/fedit" / "logged.json").exists()


def test_settings_name_no_place_and_figures_are_finite(recipe: Recipe, tmp_path: Path) -> None:
    table = settings_of(recipe.model_dump(mode="json", exclude_none=True))
    assert table["data.train"] == "sentences.csv"
    assert not [value for value in table.values() if isinstance(value, str) and (os.sep in value)]
    assert settings_of({"a": ["C:\\Users\\ada\\x.csv", "~ada/y.csv", "z"]}) == {"a": "x.csv, y.csv, z"}
    execute(recipe, tmp_path / "run")
    record = read_records(tmp_path / "run" / "rounds.jsonl")[-1]
    spoilt = type(record)(
        **{**vars(record), "train_loss": math.nan, "eval": {"global": {"loss": math.inf, "f1": None}}}
    )
    assert not {"train_loss", "global/loss", "global/f1"} & set(figures_of(spoilt))
    assert getpass.getuser() not in {str(value) for value in table.values()}


def test_a_missing_tracker_is_named_before_anything_starts(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError) as caught:
        require_trackers(["mlflow"])
    assert "pip install 'florana[mlflow]'" in str(missing(caught.value))
    (tmp_path / "r.toml").write_text(recipe.to_toml())
    done = CliRunner().invoke(app, ["run", str(tmp_path / "r.toml"), "--out", str(tmp_path / "o"), "--track", "wandb"])
    assert isinstance(done.exception, ModuleNotFoundError)
    assert not (tmp_path / "o").exists()


def test_the_command_tracks(recipe: Recipe, tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    (tmp_path / "r.toml").write_text(recipe.to_toml())
    words = ["run", str(tmp_path / "r.toml"), "--out", str(tmp_path / "o"), "--track", "tensorboard", "--json"]
    done = CliRunner().invoke(app, words, catch_exceptions=False)
    assert done.exit_code == 0, done.output
    assert [step for step, _ in scalars(tmp_path / "o" / "track" / "tensorboard")["train_loss"]] == [1, 2, 3]
