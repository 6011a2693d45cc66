"""Merging many and large adapters: one module in memory, no file left open, the same bytes on any number of threads."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save
from torch import Tensor

from florana.adapters import safetensors_io
from florana.adapters.adapter_folder import AdapterCard, read_adapter, write_adapter
from florana.adapters.merge import merge
from florana.adapters.merge_card import names_of
from florana.adapters.merge_rules import RULES
from florana.adapters.reader import AdapterReader, open_adapter
from florana.aggregate.best_rank import exact
from florana.aggregate.best_rank.project import best_rank
from florana.aggregate.error import measure
from florana.errors import InputError, RecipeError
from florana.lora.factors import Adapter, Contribution
from tests.cases import dense, make_case


@pytest.fixture
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def save_pile(
    place: Path, count: int, shapes: list[tuple[int, int]], *, rank: int = 3, fan_in_fan_out: bool = False
) -> tuple[list[Path], list[Contribution]]:
    """Adapters of unequal weights and scalings and mixed ranks on disk, and as contributions."""
    case = make_case(4, clients=count, rank=rank, shapes=shapes, drift=0.7, mixed_ranks=True, dtype=torch.float32)
    card = AdapterCard("base", None, ("q",), fan_in_fan_out=fan_in_fan_out)
    folders = []
    for part in case.parts:
        folders.append(place / part.client)
        write_adapter(folders[-1], part.adapter, card)
    return folders, case.parts


@pytest.mark.parametrize("conv1d", [False, True])
@pytest.mark.parametrize("method", RULES)
def test_a_merge_on_disk_is_the_rule_and_its_measure(method: str, conv1d: bool, tmp_path: Path) -> None:
    """best-rank of a narrow, a square and a wide sum; the other rules on equal ranks."""
    folders, parts = save_pile(tmp_path, 5, [(30, 40), (12, 12), (9, 50)], fan_in_fan_out=conv1d)
    if method in ("fedit", "flora-na"):
        folders, parts = [folders[0], folders[3]], [parts[0], parts[3]]  # of one rank
    weights = [part.weight for part in parts]
    result = merge(folders, tmp_path / "out", method=method, weights=weights)
    merged, card = read_adapter(tmp_path / "out")
    rule = RULES[method](parts, 5)
    wanted = measure(parts, merged)
    assert result.error == pytest.approx(wanted.error, abs=1e-9, rel=0)
    assert result.optimum == pytest.approx(wanted.optimum, abs=1e-9, rel=0)
    assert result.modules.keys() == wanted.modules.keys()
    for name, module in result.modules.items():
        assert module.error == pytest.approx(wanted.modules[name].error, abs=1e-9, rel=0)
        assert module.optimum == pytest.approx(wanted.modules[name].optimum, abs=1e-9, rel=0)
        assert module.weight == pytest.approx(wanted.modules[name].weight, rel=1e-9)
        assert np.allclose(dense(merged, name), dense(rule, name), atol=1e-5 * np.abs(dense(rule, name)).max())
        if method in ("best-rank", "fedit", "stack"):
            assert torch.equal(merged.modules[name].B, rule.modules[name].B), "the same bytes"
            assert torch.equal(merged.modules[name].A, rule.modules[name].A)
    assert card.fan_in_fan_out is conv1d
    assert method == "stack" or result.error > 1e-3


@pytest.mark.parametrize("shapes", [[(40, 50)] * 6, [(10, 12)] * 6], ids=["narrow", "wider than the module"])
def test_one_module_of_all_adapters_is_in_memory_at_a_time(
    shapes: list[tuple[int, int]], one_thread: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folders, _ = save_pile(tmp_path, 8, shapes)
    monkeypatch.setattr(exact, "FOLD", 4)
    alive: dict[int, str] = {}
    most_modules, most_tensors = 0, 0
    read = AdapterReader.tensor

    def counted(self: AdapterReader, key: str) -> Tensor:
        nonlocal most_modules, most_tensors
        tensor = read(self, key)
        alive[id(tensor)] = key.split(".lora_")[0]
        weakref.finalize(tensor, alive.pop, id(tensor))
        most_modules = max(most_modules, len(set(alive.values())))
        most_tensors = max(most_tensors, len(alive))
        return tensor

    monkeypatch.setattr(AdapterReader, "tensor", counted)
    merge(folders, tmp_path / "out")
    assert most_modules == 1
    if shapes[0] == (10, 12):  # folded away as they come: what is as wide as the module at first, then FOLD columns
        assert most_tensors <= 2 * 4
    else:
        assert most_tensors == 2 * 8, "this test must be able to fail"


def test_no_file_stays_open_so_their_number_does_not_matter(tmp_path: Path) -> None:
    resource = pytest.importorskip("resource")
    folders, _ = save_pile(tmp_path, 60, [(10, 12)] * 2)
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    used = len(list(Path("/proc/self/fd").iterdir())) if Path("/proc/self/fd").is_dir() else 64
    resource.setrlimit(resource.RLIMIT_NOFILE, (used + 16, before[1]))
    try:
        result = merge(folders, tmp_path / "out")
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
    assert len(result.sources) == 60


@pytest.mark.parametrize("method", ["best-rank", "stack"])
def test_the_bytes_do_not_depend_on_the_number_of_threads(method: str, tmp_path: Path) -> None:
    folders, _ = save_pile(tmp_path, 5, [(300, 400), (400, 300), (20, 12), (12, 12)])
    threads = torch.get_num_threads()
    written, seen = [], set[int]()
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            merge(folders, tmp_path / str(count), method=method, done=lambda *_: seen.add(torch.get_num_threads()))
            assert torch.get_num_threads() == count, "the caller's setting is put back"
            written.append({path.name: path.read_bytes() for path in (tmp_path / str(count)).iterdir()})
    finally:
        torch.set_num_threads(threads)
    assert written[0] == written[1] == written[2]
    assert seen == {1}, "each module is the work of one thread"


def test_the_modules_are_told_in_order_and_a_bad_one_ends_the_merge(tmp_path: Path) -> None:
    folders, _ = save_pile(tmp_path, 3, [(20, 30)] * 7)
    told: list[tuple[int, int]] = []
    merge(folders, tmp_path / "out", done=lambda count, total: told.append((count, total)))
    assert told == [(i, 7) for i in range(1, 8)]
    path = folders[1] / "adapter_model.safetensors"
    tensors = load_file(path)
    tensors["base_model.model.layer.4.q.lora_B.weight"][3, 0] = float("nan")
    path.write_bytes(save(tensors))
    threads = torch.get_num_threads()
    with pytest.raises(InputError, match=r"layer\.4\.q.*not finite"):
        merge(folders, tmp_path / "no")
    assert torch.get_num_threads() == threads
    assert not (tmp_path / "no").exists()


def test_a_file_that_shrinks_after_it_was_opened_is_named(tmp_path: Path) -> None:
    (folder,), _ = save_pile(tmp_path, 1, [(20, 30)])
    reader = open_adapter(folder)
    (path,) = reader.files()
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(InputError, match="shorter than it was"):
        reader.pair("layer.0.q")


def test_written_files_are_those_of_the_library(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    tensors = {
        f'{name} é"\n{dtype}': torch.randn(shape, generator=generator).to(dtype)
        for name, shape in (("b", (3, 2)), ("a", (5,)), ("none", (0, 4)), ("one", ()), ("turned", (4, 3)))
        for dtype in (torch.float16, torch.float32, torch.bfloat16, torch.float64)
    }
    path = tmp_path / "x.safetensors"
    safetensors_io.write_tensors(path, tensors)
    assert path.read_bytes() == save(tensors, metadata={"format": "pt"})
    places = safetensors_io.read_header(path)
    for key, tensor in tensors.items():
        assert torch.equal(safetensors_io.read_tensor(places[key], key), tensor)
    safetensors_io.write_tensors(path, {"turned": tensors['turned é"\ntorch.float32'].T})
    assert torch.equal(load_file(path)["turned"], tensors['turned é"\ntorch.float32'].T)
    with pytest.raises(InputError, match="int64"):
        safetensors_io.write_tensors(path, {"count": torch.ones(2, dtype=torch.int64)})


def test_folders_of_one_name_are_told_apart(tmp_path: Path) -> None:
    folders, _ = save_pile(tmp_path, 2, [(20, 30)])
    for folder, site in zip(folders, ("north", "south"), strict=True):
        (tmp_path / site).mkdir()
        folder.rename(tmp_path / site / "adapter")
    places = [tmp_path / site / "adapter" for site in ("north", "south", "north")]
    assert names_of(places) == ["north/adapter", "south/adapter", "north/adapter"]
    result = merge(places[:2], tmp_path / "out")
    assert [source.name for source in result.sources] == ["north/adapter", "south/adapter"]


@pytest.mark.parametrize(
    ("weights", "words"),
    [([1.0, -2.0], "-2"), ([0.0, 0.0], "all --weights are zero"), ([1.0, float("nan")], "nan"), ([1.0], "1 for 2")],
)
def test_weights_that_make_no_sum_are_refused(weights: list[float], words: str, tmp_path: Path) -> None:
    folders, _ = save_pile(tmp_path, 2, [(20, 30)])
    with pytest.raises(RecipeError, match=words):
        merge(folders, tmp_path / "out", weights=weights)


def test_an_out_that_cannot_be_made_is_refused_before_the_work(tmp_path: Path) -> None:
    folders, _ = save_pile(tmp_path, 2, [(20, 30)])
    (tmp_path / "file").touch()
    with pytest.raises(RecipeError, match="cannot be made"):
        merge(folders, tmp_path / "file" / "out", done=lambda count, total: pytest.fail("work was done"))
    with pytest.raises(RecipeError, match="no adapter was given"):
        merge([], tmp_path / "out")


def test_best_rank_on_disk_is_the_library_function(tmp_path: Path) -> None:
    folders, parts = save_pile(tmp_path, 6, [(30, 40), (40, 30)], rank=2)
    weights = [part.weight for part in parts]
    merge(folders, tmp_path / "out", rank=3, weights=weights)
    merged, _ = read_adapter(tmp_path / "out")
    wanted = best_rank(parts, 3)
    only = Adapter(merged.modules)
    for name in only.modules:
        assert np.linalg.norm(dense(only, name) - dense(wanted, name)) <= 5e-7 * np.linalg.norm(dense(wanted, name))
