"""What comes out can be used: a finished adapter answers, is measured, says what it is; a run goes on by its name."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch

from florana.adapters.merge import merge
from florana.cli.interrupted import Interrupted, interruptible, safe
from florana.errors import InputError, RecipeError
from florana.recipe.load import check
from florana.recipe.usage import USAGE, read_usage
from florana.runs.prepared import prepare
from florana.runs.setup import execute
from florana.train.evaluate import evaluate
from florana.train.finished import open_finished
from florana.train.finished_data import rows_with_answers, texts_of
from florana.train.predict import classify, write
from tests.program import florana


def rows_of(sentences: Path, out: Path) -> Path:
    """A file of some of the sentences, with a score beside the class."""
    frame = pd.read_csv(sentences).head(40)
    frame["score"] = [float(len(text)) / 10 for text in frame["text"]]
    frame.to_csv(out, index=False)
    return out


def run_of(table: dict[str, Any], out: Path, **changes: Any) -> Path:
    for name, change in changes.items():
        table[name] = {**table[name], **change} if isinstance(change, dict) else change
    execute(check(table, "t"), out)
    return out


def last_figures(run: Path) -> dict[str, float]:
    record: dict[str, Any] = json.loads((run / "rounds.jsonl").read_text().splitlines()[-1])
    found: dict[str, float] = record["eval"]["global"]
    return found


@pytest.mark.parametrize("kind", ["classes", "score", "language", "language, moved base", "dora", "moved base"])
def test_a_finished_adapter_gives_the_figures_of_its_run(
    kind: str, recipe_table: dict[str, Any], tiny_llama: Path, sentences: Path, tmp_path: Path
) -> None:
    """Loaded by PEFT alone, from the folder alone, on the run's own test rows."""
    file = rows_of(sentences, tmp_path / "rows.csv")
    recipe_table["data"] = {"train": str(file), "test": str(file), "text": "text", "label": "label", "max_length": 16}
    language = {
        "task": "causal-lm",
        "model": {"base": str(tiny_llama), "target_modules": "all-linear"},
        "partition": {"kind": "iid"},
    }
    changes: dict[str, Any] = {
        "classes": {},
        "score": {"task": "sequence-regression", "data": {"label": "score"}, "partition": {"kind": "iid"}},
        "language": language,
        "language, moved base": {**language, "strategy": {"name": "fedex-lora"}},
        "dora": {"model": {"variant": "dora"}},
        "moved base": {"strategy": {"name": "fedex-lora"}},
    }[kind]
    run = run_of(recipe_table, tmp_path / "run", **changes)
    model = open_finished(run, device="cpu")
    found = evaluate(model, rows_with_answers(model, file, None, None), 16)
    assert found == pytest.approx(last_figures(run), abs=1e-4)
    assert open_finished(run / "adapter", device="cpu").usage == model.usage
    if model.drawn:  # a head that was drawn for the run
        with pytest.raises(InputError, match=r"the base has no classifier.* of its own"), model.starting():
            pass
        return
    with model.starting():
        before = evaluate(model, rows_with_answers(model, file, None, None), 16)
    assert before == pytest.approx(json.loads((run / "setup.json").read_text())["start"], abs=1e-4)
    assert evaluate(model, rows_with_answers(model, file, None, None), 16) == found


def test_classes_have_their_names_and_probabilities(
    recipe_table: dict[str, Any], sentences: Path, tmp_path: Path
) -> None:
    recipe_table["data"] |= {"labels": None}
    recipe_table["data"].pop("labels")
    run = run_of(recipe_table, tmp_path / "run")
    model = open_finished(run, device="cpu")
    texts = texts_of(sentences, None, model.usage)[:5]
    answers = classify(model, texts, batch_size=2)
    assert [answer["text"] for answer in answers] == [text for (text,) in texts]
    for answer in answers:
        assert sum(answer["probabilities"].values()) == pytest.approx(1.0)
        assert (
            answer["probabilities"][answer["label"]] == answer["probability"] == max(answer["probabilities"].values())
        )
    alone = [classify(model, [text])[0]["probability"] for text in texts]
    assert alone == pytest.approx([answer["probability"] for answer in answers], abs=1e-6)
    setup = json.loads((run / "setup.json").read_text())
    assert model.usage.labels == setup["labels"]


def test_language_models_write(recipe_table: dict[str, Any], tiny_llama: Path, tmp_path: Path) -> None:
    changes = {"task": "causal-lm", "model": {"base": str(tiny_llama), "target_modules": "all-linear"}}
    run = run_of(recipe_table, tmp_path / "run", **changes, partition={"kind": "iid"})
    model = open_finished(run, device="cpu")
    options: dict[str, Any] = {"max_new_tokens": 4, "seed": 3}
    greedy = write(model, ["a good film", "a"], temperature=0.0, samples=1, **options)
    assert [answer["prompt"] for answer in greedy] == ["a good film", "a"]
    drawn = write(model, ["a good film"], temperature=1.0, samples=3, **options)
    assert len(drawn) == 3
    assert drawn == write(model, ["a good film"], temperature=1.0, samples=3, **options)


@pytest.mark.filterwarnings("default")
def test_the_ten_lines_of_the_card_load_the_adapter(
    recipe_table: dict[str, Any], sentences: Path, tmp_path: Path
) -> None:
    frame = pd.read_csv(sentences)
    frame["label"] = [["dull", "ENTY"][int(value)] for value in frame["label"]]
    frame.to_csv(tmp_path / "named.csv", index=False)
    run = run_of(recipe_table, tmp_path / "run", data={"train": str(tmp_path / "named.csv")}, title="A [b]good[/b] run")
    card = (run / "adapter" / "README.md").read_text()
    assert "# A [b]good[/b] run" in card
    assert "client-0" not in card
    figures = last_figures(run)
    assert f"| accuracy | {json.loads((run / 'setup.json').read_text())['start']['accuracy']:.4f} " in card
    assert f"{figures['loss']:.4f}" in card
    code = re.search(r"```python\n(.*?)```", card, re.DOTALL)
    assert code is not None
    done = subprocess.run(
        [sys.executable, "-c", code[1]], cwd=run / "adapter", capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert re.search(r"'label': '(dull|ENTY)'", done.stdout)
    assert len(code[1].strip().splitlines()) <= 14
    answer = classify(open_finished(run, device="cpu"), [("a text",)])[0]
    assert answer["label"] in done.stdout


def test_the_same_run_leaves_the_same_folder(recipe_table: dict[str, Any], tmp_path: Path) -> None:
    one, other = (run_of(recipe_table, tmp_path / name) for name in ("one", "other"))
    names = sorted(path.name for path in (one / "adapter").iterdir())
    tokenizer = ["tokenizer.json", "tokenizer_config.json"]
    assert names == ["README.md", "adapter_config.json", "adapter_model.safetensors", USAGE, *tokenizer]
    assert str(tmp_path) not in "".join((one / "adapter" / name).read_text() for name in (*tokenizer, USAGE))
    for name in names:
        assert (one / "adapter" / name).read_bytes() == (other / "adapter" / name).read_bytes()


def test_a_merged_folder_of_runs_answers_as_they_do(recipe_table: dict[str, Any], tmp_path: Path) -> None:
    """What says how they are asked, and the tokenizer, stand beside the merge where all have the same."""
    runs = [run_of(recipe_table, tmp_path / str(seed), seed=seed) for seed in (0, 1)]
    merged = merge([run / "adapter" for run in runs], tmp_path / "merged")
    for name in (USAGE, "tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "merged" / name).read_bytes() == (runs[0] / "adapter" / name).read_bytes()
    assert not any("classes" in note for note in merged.notes)
    (averaged,) = [note for note in merged.notes if "averaged with the weights" in note]
    assert averaged.endswith(": classifier.bias, classifier.weight")
    assert f"Note: {averaged}." in (tmp_path / "merged" / "README.md").read_text()
    assert set(classify(open_finished(tmp_path / "merged", device="cpu"), [("a good film",)])[0]["probabilities"]) == {
        "0", "1",
    }  # fmt: skip
    own = runs[1] / "adapter" / USAGE
    own.write_text(own.read_text().replace('"0",\n  "1"', '"1",\n  "0"'))
    (runs[1] / "adapter" / "tokenizer.json").unlink()
    told = merge([run / "adapter" for run in runs], tmp_path / "unlike")
    assert any("see that their classes have one order" in note for note in told.notes)
    assert sorted(path.name for path in (tmp_path / "unlike").iterdir()) == [
        "README.md", "adapter_config.json", "adapter_model.safetensors",
    ]  # fmt: skip


def test_nothing_from_beside_an_adapter_is_copied_through_a_link(recipe_table: dict[str, Any], tmp_path: Path) -> None:
    run = run_of(recipe_table, tmp_path / "run")
    (tmp_path / "secret").write_text("{}")
    (run / "adapter" / "tokenizer.json").unlink()
    (run / "adapter" / "tokenizer.json").symlink_to(tmp_path / "secret")
    merge([run / "adapter"], tmp_path / "merged")
    assert not (tmp_path / "merged" / "tokenizer.json").exists()
    cache = tmp_path / "models--a--b" / "snapshots" / "1"
    cache.parent.mkdir(parents=True)
    shutil.copytree(run / "adapter", cache, symlinks=True)
    blob = tmp_path / "models--a--b" / "blobs" / "x"
    blob.parent.mkdir()
    blob.write_text("{}")
    (cache / "tokenizer.json").unlink()
    (cache / "tokenizer.json").symlink_to("../../blobs/x")
    merge([cache], tmp_path / "cached")
    assert (tmp_path / "cached" / "tokenizer.json").read_text() == "{}"


def test_the_adapter_names_the_base_as_others_load_it(recipe_table: dict[str, Any], tmp_path: Path) -> None:
    """And the run that made it goes on using its own."""
    run = run_of(recipe_table, tmp_path / "run", model={"hub_name": "some-lab/tiny-bert"})
    config = json.loads((run / "adapter" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "some-lab/tiny-bert"
    card = (run / "adapter" / "README.md").read_text()
    assert 'base_model: "some-lab/tiny-bert"' in card
    assert 'base = "some-lab/tiny-bert"' in card
    assert str(tmp_path) not in card
    for place in (run, run / "adapter"):
        assert classify(open_finished(place, device="cpu"), [("a good film",)])
    shutil.copytree(run / "adapter", tmp_path / "sent" / "adapter")
    with pytest.raises(InputError, match="some-lab/tiny-bert"):
        open_finished(tmp_path / "sent" / "adapter", device="cpu")
    with pytest.raises(RecipeError, match=r"model\.hub_name"):
        run_of(recipe_table, tmp_path / "other", model={"hub_name": "a b"})


def test_a_merged_folder_answers_when_its_classes_are_named(recipe_table: dict[str, Any], tmp_path: Path) -> None:
    runs = [run_of(recipe_table, tmp_path / str(seed), seed=seed) for seed in (0, 1)]
    merge([run / "adapter" for run in runs], tmp_path / "merged")
    model = open_finished(tmp_path / "merged", device="cpu", labels=["dull", "bright"])
    assert classify(model, [("a good film",)])[0]["label"] in ("dull", "bright")
    with pytest.raises(InputError, match="3 classes are named, and the model tells 2 apart"):
        open_finished(tmp_path / "merged", device="cpu", labels=["a", "b", "c"])


def test_an_adapter_without_its_head_is_refused(recipe_table: dict[str, Any], tmp_path: Path) -> None:
    """Of a run whose heads stayed with the clients: Transformers would draw one at random."""
    run = run_of(recipe_table, tmp_path / "run", model={"head": "personal"})
    with pytest.raises(InputError, match=r"does not hold .*classifier"):
        open_finished(run, device="cpu")


def test_bad_folders_are_named(recipe_table: dict[str, Any], tmp_path: Path) -> None:
    run = run_of(recipe_table, tmp_path / "run")
    adapter = run / "adapter"
    with pytest.raises(InputError, match="does not exist"):
        open_finished(tmp_path / "nowhere")
    usage = (adapter / USAGE).read_text()
    for text, why in (
        ("{", "cannot be read"),
        ('{"task": "causal-lm", "more": 1}', "more: Extra inputs"),
        ('{"task": "poem"}', "task"),
        ('{"task": "causal-lm", "max_length": 1e400}', "florana.json"),
        ("[" * 100_000, "cannot be read"),
    ):
        (adapter / USAGE).write_text(text)
        with pytest.raises(InputError, match=why):
            open_finished(adapter)
    (adapter / USAGE).write_text(usage)
    (run / "recipe.toml").unlink()  # else the run itself says which base is meant
    config = json.loads((adapter / "adapter_config.json").read_text())
    for change, why in (
        ({"base_model_name_or_path": ""}, "names no base model"),
        ({"base_model_name_or_path": str(tmp_path / "none")}, "holds no config.json"),
        ({"peft_type": "IA3"}, "not describe a LoRA adapter"),
        ({"task_type": None}, "task_type"),
    ):
        (adapter / "adapter_config.json").write_text(json.dumps(config | change))
        if "task_type" in change:
            (adapter / USAGE).unlink()
        with pytest.raises(InputError, match=why):
            open_finished(adapter, device="cpu")
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    torch.save({}, adapter / "adapter_model.bin")
    (adapter / "adapter_model.safetensors").unlink()
    with pytest.raises(InputError, match="safetensors"):
        open_finished(adapter, device="cpu")


def test_on_the_command_line(recipe_table: dict[str, Any], sentences: Path, tmp_path: Path) -> None:
    run = run_of(recipe_table, tmp_path / "run")
    one = florana("predict", str(run), "a good film", "a sad plot", "--json", "--device", "cpu")
    assert one.returncode == 0, one.stderr
    typed = florana("predict", str(run), "--json", "--device", "cpu", typed="a good film\n\na sad plot\n")
    assert json.loads(typed.stdout) == json.loads(one.stdout)
    shown = florana("predict", str(run), "[/nope] \x1b[2J film", "--device", "cpu")
    assert shown.returncode == 0, shown.stderr
    assert "\x1b[2J" not in shown.stdout
    measured = florana("evaluate", str(run), "--data", str(sentences), "--json")
    assert measured.returncode == 0, measured.stderr
    assert {"rows", "accuracy", "loss"} <= json.loads(measured.stdout).keys()
    for arguments, code, why in (
        (("predict", str(run)), 2, "there is no text"),
        (("predict", str(run), "x", "--file", str(sentences)), 2, "give one of them"),
        (("predict", str(run), "x", "--samples", "2"), 2, "greedy answers are alike"),
        (("predict", str(tmp_path / "none"), "x"), 3, "does not exist"),
        (("predict", str(run), "--file", str(tmp_path / "none.csv")), 3, "does not exist"),
        (("predict", str(run), "--file", str(sentences), "--text", "txt"), 3, "'txt'"),
        (("evaluate", str(run), "--data", str(sentences), "--label", "lbl"), 3, "'lbl'"),
        (("evaluate", str(run), "--data", str(sentences), "--starting"), 3, "leave --starting out"),
    ):
        done = florana(*arguments)
        assert done.returncode == code, (arguments, done.stderr)
        assert why in " ".join(done.stderr.split()), done.stderr
        assert "Traceback" not in done.stderr


def test_a_run_goes_on_by_its_folder_alone(recipe_table: dict[str, Any], tmp_path: Path) -> None:
    run = run_of(recipe_table, tmp_path / "run")
    rounds = recipe_table["federation"]["rounds"]
    more = florana("run", "--resume", "run", "--set", f"federation.rounds={rounds + 1}", "--json", cwd=tmp_path)
    assert more.returncode == 0, more.stderr
    assert len((run / "rounds.jsonl").read_text().splitlines()) == rounds + 1
    for arguments, why in (
        (("run", "run"), "go on with it: florana run --resume run"),
        (("run", "run", "--resume", "--out", "other"), "--out names another"),
        (("run", "."), "no recipe and no run folder"),
    ):
        done = florana(*arguments, cwd=tmp_path)
        assert done.returncode == 2, done.stderr
        assert why in done.stderr


@pytest.mark.parametrize(
    ("verb", "place", "how"),
    [
        (["run", "r.toml", "--out", "long"], "long", "florana run --resume long"),
        (["compare", "r.toml", "--out", "long", "--methods", "fedit", "--seeds", "1", "--jobs", "1"],
         "long/runs/as-recipe/seed-3/fedit", "the same command"),
    ],
)  # fmt: skip
def test_ctrl_c_says_what_is_safe_and_how_to_go_on(
    verb: list[str], place: str, how: str, recipe_table: dict[str, Any], tmp_path: Path
) -> None:
    import tomli_w

    recipe_table["federation"] = {"rounds": 100_000}
    recipe_table["study"] = {"controls": []}
    (tmp_path / "r.toml").write_text(tomli_w.dumps(recipe_table))
    process = subprocess.Popen(
        [sys.executable, "-m", "florana", *verb],
        cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip
    lines = tmp_path / place / "rounds.jsonl"
    while not lines.exists() or len(lines.read_text().splitlines()) < 2:
        assert process.poll() is None
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGINT)
    _, told = process.communicate(timeout=120)
    assert process.returncode == 130
    done = len(lines.read_text().splitlines())
    last = told.strip().splitlines()[-1]
    assert last == f"interrupted; {done} rounds are safe; go on with: {how}"


def test_a_ctrl_c_that_python_drops_is_raised_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Cleared:
        def __del__(self) -> None:
            signal.raise_signal(signal.SIGINT)

    dropped: list[Any] = []
    monkeypatch.setattr(sys, "unraisablehook", lambda lost: dropped.append(lost.exc_type))
    handler = signal.getsignal(signal.SIGINT)

    def run() -> None:
        with interruptible(lambda: safe([tmp_path])) as again:
            again()
            Cleared()
            assert dropped == [KeyboardInterrupt]
            again()

    with pytest.raises(Interrupted, match="no round was committed yet"):
        run()
    assert signal.getsignal(signal.SIGINT) is handler


def test_what_a_run_says_of_itself_is_read_back(recipe_table: dict[str, Any], tmp_path: Path) -> None:
    run = run_of(recipe_table, tmp_path / "run")
    usage = read_usage(run / "adapter")
    assert usage is not None
    assert (usage.task, usage.text, usage.label) == ("sequence-classification", "text", "label")
    assert read_usage(run) is None
    assert prepare(check(recipe_table, "t")).partition["labels"] == usage.labels
