"""What a model writes: as Transformers writes it, by the seed alone, scored in a run when it is due."""

from __future__ import annotations

import copy
import json
import statistics
from pathlib import Path
from typing import Any

import pytest
import torch

from florana.errors import InputError, RecipeError
from florana.recipe.load import check, read_recipe
from florana.recipe.schema import Model
from florana.report.page import write_report
from florana.runs.completions import last_completions
from florana.runs.setup import execute
from florana.score.programs import Verdict
from florana.train.generate import Written, generate
from florana.train.generation_eval import generation_benchmark
from florana.train.model import Workbench
from tests.conftest import SHARED
from tests.program import florana
from tests.score_cases import HUMANEVAL

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")


PROMPTS = ["Once upon a time", "The little dog wanted to play, but it was raining. So he", "One day, Tim", "Lily saw a"]


@pytest.fixture(scope="module")
def bench() -> Workbench:
    return Workbench(Model(base=str(SHARED / "models" / "stories260K")), "causal-lm", (), 0)


def write(bench: Workbench, **changes: Any) -> Written:
    return generate(bench, PROMPTS, **{"max_new_tokens": 24, **changes})


@pytest.mark.shared
def test_greedy_generation_is_that_of_transformers_alone_and_in_a_batch(bench: Workbench) -> None:
    together, alone = write(bench), write(bench, batch_size=1)
    assert together == alone
    for prompt, (text,) in zip(PROMPTS, together.texts, strict=True):
        ids = [1, *bench.tokenizer(prompt, add_special_tokens=False)["input_ids"]]
        out = bench.model.generate(
            input_ids=torch.tensor([ids]), attention_mask=torch.ones(1, len(ids)), max_new_tokens=24, do_sample=False
        )
        assert bench.tokenizer.decode(out[0], skip_special_tokens=True) == prompt + text


@pytest.mark.shared
def test_samples_depend_on_the_seed_and_the_prompt_and_on_nothing_else(bench: Workbench) -> None:
    drawn = write(bench, temperature=0.8, samples=2, seed=1)
    torch.manual_seed(3)
    assert drawn == write(bench, temperature=0.8, samples=2, seed=1, batch_size=3)
    assert drawn != write(bench, temperature=0.8, samples=2, seed=2)
    assert all(first != second for first, second in drawn.texts)
    assert write(bench, temperature=1e-4, seed=1) == write(bench)


@pytest.mark.shared
def test_samples_have_the_softmaxs_frequencies(bench: Workbench) -> None:
    ids = torch.tensor([[1, *bench.tokenizer("Once upon a time", add_special_tokens=False)["input_ids"]]])
    with torch.no_grad():
        chances = (bench.model(input_ids=ids).logits[0, -1] / 2.0).softmax(-1)
    texts = generate(bench, ["Once upon a time"], max_new_tokens=1, temperature=2.0, samples=600, batch_size=600).texts[
        0
    ]
    likely = bench.tokenizer.decode([1, int(chances.argmax())], skip_special_tokens=True)
    share = statistics.mean(text == likely for text in texts)
    assert share == pytest.approx(float(chances.max()), abs=4 * (0.25 / 600) ** 0.5)


@pytest.mark.shared
def test_stops_end_a_text_and_long_prompts_lose_their_beginning(bench: Workbench) -> None:
    whole = write(bench).texts[0][0]
    assert " little" in whole
    assert write(bench, stops=[" little", "zzz"]).texts[0][0] == whole.split(" little")[0]
    long = "Tim was sad. " * 200 + PROMPTS[0]
    cut = generate(bench, [long, PROMPTS[0]], max_new_tokens=24)
    assert cut.cut_prompts == 1
    with pytest.raises(InputError, match="the model's context has 512 tokens"):
        write(bench, max_new_tokens=512)


@pytest.fixture
def table() -> dict[str, Any]:
    return {
        "task": "causal-lm",
        "seed": 5,
        "model": {"base": str(SHARED / "models" / "stories260K"), "target_modules": ["q_proj"], "rank": 2},
        "data": {
            "train": str(SHARED / "gsm8k" / "train.jsonl"),
            "test": str(SHARED / "gsm8k" / "test.jsonl"),
            "text": ["question", "answer"],
            "max_length": 32,
            "train_limit": 40,
            "test_limit": 4,
        },
        "partition": {"kind": "iid", "clients": 2},
        "train": {"steps": 1, "batch_size": 2},
        "federation": {"rounds": 3},
        "strategy": {"name": "best-rank"},
        "generation": {
            "task": "gsm8k",
            "file": str(SHARED / "gsm8k" / "test.jsonl"),
            "limit": 3,
            "max_new_tokens": 8,
            "shots": 1,
        },
    }


@pytest.mark.shared
def test_a_run_scores_what_the_global_model_writes_when_it_is_due(table: dict[str, Any], tmp_path: Path) -> None:
    first = execute(check(table, "r"), tmp_path / "last")
    assert [set(r.eval["global"]) for r in first.records[:2]] == [{"loss", "perplexity"}] * 2
    assert {"exact_match", "exact_match_flexible", "unparsed", "cut_prompts"} < set(first.records[-1].eval["global"])
    table["generation"]["every"] = 2
    table["evaluate"] = {"every": 3}
    every = execute(read_back(table, tmp_path), tmp_path / "every")
    assert [sorted(r.eval.get("global", {}))[:1] for r in every.records] == [[], ["cut_prompts"], ["cut_prompts"]]
    assert every.records[-1].eval["global"] == first.records[-1].eval["global"]


@pytest.mark.shared
def test_what_was_written_is_kept_with_its_verdict_and_shown(table: dict[str, Any], tmp_path: Path) -> None:
    """One line per completion; the figures are the means of the verdicts; the page shows the text as text."""
    table["federation"]["rounds"] = 2
    table["generation"] |= {"every": 1, "samples": 2, "temperature": 1.0}
    run = execute(check(table, "r"), tmp_path / "run")
    for record in run.records:
        lines = (tmp_path / "run" / "completions" / f"round-{record.round}.jsonl").read_text().splitlines()
        kept = [json.loads(line) for line in lines]
        assert len(kept) == 3 * 2
        assert kept[0]["prompt"] == kept[1]["prompt"] != kept[2]["prompt"]
        assert kept[0]["prompt"].endswith("\nAnswer:")
        mean = statistics.mean(one["verdict"]["unparsed"] for one in kept)
        assert mean == record.eval["global"]["unparsed"]
    assert last_completions(tmp_path / "run", 3) == (2, kept[:3])
    first = tmp_path / "run" / "completions" / "round-2.jsonl"
    first.write_text(json.dumps({**kept[0], "completion": "<script>alert(1)</script>"}) + "\n")
    page = write_report([tmp_path / "run"], tmp_path / "r.html").read_text()
    assert "<b>&lt;script&gt;alert(1)&lt;/script&gt;</b>" in page
    assert "What the model wrote: best-rank, round 2" in page


CHAT = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def test_a_chat_template_is_the_tokenizers_own_and_nothing_stands_before_it(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench = Workbench(Model(base=str(tiny_llama), target_modules=["q_proj"]), "causal-lm", (), 0)
    rows = [{"question": f"{n} + 1?", "answer": f"#### {n + 1}"} for n in range(3)]
    (tmp_path / "p.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "e.jsonl").write_text(json.dumps({"question": "7 + 7?", "answer": "#### 14"}) + "\n")
    files = {"file": str(tmp_path / "p.jsonl"), "examples": str(tmp_path / "e.jsonl")}
    recipe = check(
        {
            "task": "causal-lm",
            "model": {"base": str(tiny_llama)},
            "data": {"train": str(tmp_path / "e.jsonl"), "text": "question"},
            "partition": {"clients": 2},
            "train": {"steps": 1},
            "federation": {"rounds": 1},
            "strategy": {"name": "fedit"},
            "generation": {"task": "gsm8k", "template": "chat", "shots": 1, "max_new_tokens": 5, **files},
        },
        "t",
    )
    with pytest.raises(InputError, match="has no chat template"):
        generation_benchmark(recipe, bench)
    bench.tokenizer.chat_template = CHAT
    asked = generation_benchmark(recipe, bench)
    assert asked is not None
    shown, user = "Question: 7 + 7?\nAnswer:", "Question: 1 + 1?\nAnswer:"
    before = f"<|user|>{shown}<|end|><|assistant|>#### 14<|end|>"
    assert asked.prompts[1] == f"{before}<|user|>{user}<|end|><|assistant|>"
    ids = bench.tokenizer.apply_chat_template(
        [
            {"role": "user", "content": shown},
            {"role": "assistant", "content": "#### 14"},
            {"role": "user", "content": user},
        ],
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=True,
    )["input_ids"]
    given: list[list[int]] = []
    writes = bench.model.generate

    def recorded(input_ids: torch.Tensor, attention_mask: torch.Tensor, **options: Any) -> torch.Tensor:
        given.extend(row[mask.bool()].tolist() for row, mask in zip(input_ids, attention_mask, strict=True))
        return writes(input_ids=input_ids, attention_mask=attention_mask, **options)

    monkeypatch.setattr(bench.model, "generate", recorded)
    asked.run(bench)
    assert ids[0].tolist() in given, "no beginning token before the template's own"
    assert len(given) == 3
    bench.tokenizer.chat_template = "{{ raise_exception('only system turns') }}"
    with pytest.raises(InputError, match="refuses a prompt"):
        generation_benchmark(recipe, bench)


@pytest.mark.shared
def test_evaluate_scores_a_finished_adapter_as_its_run_did(table: dict[str, Any], tmp_path: Path) -> None:
    """The same figures and the same texts, from the folder alone; worked examples and draws follow the seed."""
    table["federation"]["rounds"] = 1
    table["generation"] |= {"samples": 2, "temperature": 1.0}
    run = execute(check(table, "r"), tmp_path / "run")
    own = table["generation"]
    command = ["evaluate", "run", "--data", own["file"], "--benchmark", "gsm8k", "--completions", "c.jsonl", "--json"]
    command += ["--starting", "--seed", "5", "--set", f"generation.examples='{table['data']['train']}'"]
    for key in ("limit", "max_new_tokens", "shots", "samples", "temperature"):
        command += ["--set", f"{key}={own[key]}"]
    done = florana(*command, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    figures = json.loads(done.stdout)
    assert figures.pop("problems") == 3
    assert figures.pop("starting").keys() == figures.keys()
    assert figures == {name: run.records[-1].eval["global"][name] for name in figures}
    assert len(figures) == 4
    kept = tmp_path / "run" / "completions" / "round-1.jsonl"
    assert (tmp_path / "c.jsonl").read_bytes() == kept.read_bytes()
    again = florana(*command, cwd=tmp_path)
    assert again.returncode == 2
    assert "c.jsonl exists already" in again.stderr


def test_a_benchmark_that_cannot_be_scored_is_refused_before_the_model_is_loaded(tmp_path: Path) -> None:
    for more, words in {
        ("--benchmark", "gsmk"): "'gsm8k', 'math', 'humaneval' or 'mbpp'",
        ("--benchmark", "gsm8k", "--set", "shot=5"): "did you mean 'shots'?",
        ("--benchmark", "mbpp"): "generation.run_programs = true",
        ("--set", "shots=5"): "--set is of --benchmark, which is not given",
        ("--completions", "c"): "--completions is of --benchmark",
    }.items():
        done = florana("evaluate", "none", "--data", "none.jsonl", *more, cwd=tmp_path)
        assert done.returncode == 2, done.stderr
        assert words in " ".join(done.stderr.split())


def test_a_model_of_classes_writes_nothing(recipe_table: dict[str, Any], tmp_path: Path) -> None:
    recipe_table["federation"]["rounds"] = 1
    execute(check(recipe_table, "r"), tmp_path / "run")
    (tmp_path / "p.jsonl").write_text(json.dumps({"question": "1 + 1?", "answer": "#### 2"}) + "\n")
    done = florana("evaluate", "run", "--data", "p.jsonl", "--benchmark", "gsm8k", cwd=tmp_path)
    assert done.returncode == 3
    assert "does not write text" in done.stderr


def read_back(table: dict[str, Any], folder: Path) -> Any:
    """The recipe through its own TOML, with a path that counts from the recipe's folder."""
    (folder / "problems.jsonl").write_bytes((SHARED / "gsm8k" / "test.jsonl").read_bytes())
    table["generation"]["file"] = "problems.jsonl"
    (folder / "r.toml").write_text(check(table, "r").to_toml())
    recipe = read_recipe(folder / "r.toml")
    assert recipe.generation is not None
    assert recipe.generation.file == str((folder / "problems.jsonl").resolve())
    return recipe


@pytest.mark.usefixtures("runnable")
@pytest.mark.shared
def test_a_run_with_programs(table: dict[str, Any], tmp_path: Path) -> None:
    table["federation"]["rounds"] = 1
    table["generation"] = {
        "task": "humaneval",
        "file": str(HUMANEVAL),
        "limit": 2,
        "max_new_tokens": 6,
        "run_programs": True,
        "samples": 2,
        "temperature": 0.5,
        "k": [1, 2],
    }
    scores = execute(check(table, "r"), tmp_path / "run").records[-1].eval["global"]
    assert scores["pass@1"] == scores["pass@2"] == 0.0
    assert {"stopped", "shut_in"} < set(scores)
    assert json.loads((tmp_path / "run" / "rounds.jsonl").read_text())["eval"]["global"] == scores


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"task": "humaneval", "shots": 0}, "runs programs that a model wrote on this machine"),
        ({"task": "humaneval", "run_programs": True}, "has no meaning for humaneval"),
        ({"task": "mbpp", "run_programs": True, "k": [5]}, "asks for pass@5, but generation.samples = 1"),
        ({"k": [2]}, "are of humaneval and mbpp"),
        ({"run_programs": True}, "are of humaneval and mbpp"),
        ({"samples": 2}, "needs generation.temperature above 0"),
        ({"examples": "x.jsonl", "shots": 0}, "generation.shots = 0"),
        ({"max_new_token": 3}, "did you mean 'max_new_tokens'?"),
        ({"task": "gsm9k"}, "'gsm8k', 'math', 'humaneval' or 'mbpp'"),
    ],
)
def test_generation_settings_that_cannot_hold_are_refused(
    change: dict[str, Any], words: str, table: dict[str, Any]
) -> None:
    changed = copy.deepcopy(table)
    changed["generation"] |= change
    with pytest.raises(RecipeError) as caught:
        check(changed, "r.toml")
    assert words in str(caught.value)


def test_generation_needs_a_model_that_writes(table: dict[str, Any]) -> None:
    with pytest.raises(RecipeError, match="no model of its own"):
        check(table | {"strategy": {"name": "fedsa-lora"}}, "r")
    with pytest.raises(RecipeError, match="a classifier writes no text"):
        check(table | {"task": "sequence-classification", "data": {**table["data"], "label": "x"}}, "r")


@pytest.mark.shared
@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"file": "nowhere.jsonl"}, "does not exist"),
        ({"shots": 9000}, "has 7473 examples that are not asked"),
        ({"max_new_tokens": 600}, "the model's context has 512 tokens"),
    ],
)
def test_an_exam_that_cannot_be_set_is_explained(
    change: dict[str, Any], words: str, table: dict[str, Any], tmp_path: Path
) -> None:
    table["generation"] |= change
    with pytest.raises(InputError, match=words):
        execute(check(table, "r"), tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.shared
def test_programs_that_cannot_run_here_are_refused_before_training(
    table: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*arguments: object) -> Verdict:
        raise InputError("not here")

    monkeypatch.setattr("florana.train.generation_eval.run_program", refuse)
    table["generation"] = {"task": "humaneval", "file": str(HUMANEVAL), "limit": 1, "max_new_tokens": 4}
    table["generation"]["run_programs"] = True
    with pytest.raises(InputError, match="not here"):
        execute(check(table, "r"), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_verdicts_are_frozen() -> None:
    with pytest.raises(AttributeError):
        Verdict(True, "passed").passed = False  # type: ignore[misc]
