"""The same recipe, the same bytes: from the local engine, a simulation on Ray, and three sites over TLS."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("flwr", reason="the extra 'flower' is not installed")

from florana.flower.app.export import export
from florana.flower.app.settings import Settings
from florana.recipe.load import check
from florana.recipe.schema import Recipe
from florana.runs.setup import execute
from tests.deployment import environment, federation, simulation
from tests.program import HANGS, wait_for

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")


def local(recipe: Recipe, unlike: dict[str, Any], folder: Path) -> Path:
    execute(recipe, folder / "local")
    return folder / "local"


def simulated(recipe: Recipe, unlike: dict[str, Any], folder: Path) -> Path:
    out, home = folder / "simulated", folder / "home"
    app = export(recipe, folder / "app", Settings(out=str(out), wait=HANGS, deadline=HANGS))
    command = ["flwr", "run", str(app), "own", "--stream", "--federation-config", "num-supernodes=3"]
    own = environment(home)
    with simulation(home, own):
        done = subprocess.run(command, env=own, capture_output=True, text=True, timeout=HANGS, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
        # Flower follows a run only while it is told; what counts is the run's own outcome
        assert wait_for(lambda: (out / "outcome.json").exists()), done.stdout + done.stderr
    return out


# an operator's machine that was taken over: its server offers an app with code of its own to every site
EVIL = """
import hashlib, io, zipfile
from pathlib import Path
import florana.flower.deploy.serve as serve
from florana.cli.main import main
from flwr.supercore.fab import Fab

make_link = serve.make_link

def changed(keys):
    link, app = make_link(keys)
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as fab:
        fab.writestr("pyproject.toml", {project!r})
        fab.writestr("evil/client_app.py", "from pathlib import Path\\nPath({mark!r}).write_text('ran')\\n")
    offered = link.state.store_fab(Fab(hashlib.sha256(content.getvalue()).hexdigest(), content.getvalue(), {{}}))
    link.state.run_ids[link.run].run.fab_hash = offered
    Path({mark!r} + ".offered").write_text(offered)
    return link, app

serve.make_link = changed
main()
"""
PROJECT = """
[project]
name = "evil"
version = "1.0.0"
[tool.flwr.app]
publisher = "evil"
[tool.flwr.app.components]
serverapp = "evil.client_app:app"
clientapp = "evil.client_app:app"
"""


def deployed(recipe: Recipe, unlike: dict[str, Any], folder: Path) -> Path:
    mark = folder / "mark"
    (folder / "evil.py").write_text(EVIL.format(mark=str(mark), project=PROJECT))
    with federation(unlike, folder, [f"client-{index}" for index in range(3)]) as fed:
        options = ["--wait", str(HANGS), "--deadline", str(HANGS)]
        command = [sys.executable, str(folder / "evil.py"), *fed.serving(*options)]
        done = subprocess.run(command, env=environment(fed.home), capture_output=True, text=True, timeout=HANGS)
        assert done.returncode == 0, done.stdout + done.stderr
    assert (folder / "mark.offered").exists(), "it was offered"
    assert not mark.exists(), "and no site ran it"
    return fed.out


@pytest.mark.parametrize("engine", [local, simulated, deployed], ids=lambda engine: engine.__name__)
def test_the_same_recipe_ends_in_the_same_bytes_on_every_engine(
    engine: Callable[[Recipe, dict[str, Any], Path], Path],
    unlike: dict[str, Any],
    tmp_path: Path,
    reference: Callable[[dict[str, Any]], bytes],
) -> None:
    out = engine(check(unlike, "test"), unlike, tmp_path)
    assert (out / "adapter" / "adapter_model.safetensors").read_bytes() == reference(unlike)
    assert len((out / "rounds.jsonl").read_text().splitlines()) == 2


@pytest.fixture
def reference(tmp_path_factory: pytest.TempPathFactory) -> Callable[[dict[str, Any]], bytes]:
    def run(unlike: dict[str, Any]) -> bytes:
        folder = tmp_path_factory.mktemp("reference")
        execute(check(unlike, "test"), folder / "run")
        return (folder / "run" / "adapter" / "adapter_model.safetensors").read_bytes()

    return run
