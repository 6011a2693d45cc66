"""The recipe's section [generation] put to work: problems read and asked once, then written and scored per model."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from florana.errors import InputError
from florana.federation.sampling import derive
from florana.recipe import schema as r
from florana.score import benchmarks
from florana.score.programs import Limits, run_program
from florana.train.generate import generate, room_for_prompts
from florana.train.probe import Probed

Keep = Callable[[Sequence[Mapping[str, Any]]], None]
"""Takes the completions of one scoring: each with its prompt, its text and its verdict."""


@dataclass(frozen=True, eq=False)
class GenerationBenchmark:
    """The problems with their prompts, and the settings they are written under.

    Args:
        settings: the recipe's section [generation].
        rows: the problems, as their file has them.
        prompts: one per row, as text.
        seed: of the samples.
        opening: tokens before every prompt; None: the tokenizer's beginning token.
    """

    settings: r.Generation
    rows: tuple[Mapping[str, Any], ...]
    prompts: tuple[str, ...]
    seed: int
    opening: tuple[int, ...] | None = None

    def due(self, round_: int, rounds: int) -> bool:
        """Whether the global model is scored after that round."""
        every = self.settings.every
        return round_ == rounds or (every is not None and round_ % every == 0)

    def run(self, bench: Probed, keep: Keep = lambda completions: None) -> dict[str, float]:
        """The figures of the model as it is on the bench; `cut_prompts` is the share of prompts that did not fit.

        Args:
            bench: the model.
            keep: given what was written, and the verdict on each completion.
        """
        own = self.settings
        written = generate(
            bench,
            self.prompts,
            max_new_tokens=own.max_new_tokens,
            stops=benchmarks.TASKS[own.task].stops,
            temperature=own.temperature,
            samples=own.samples,
            seed=self.seed,
            batch_size=own.batch_size,
            opening=self.opening,
        )
        limits = Limits(3.0 * own.program_seconds, own.program_seconds, own.program_memory)
        marks = benchmarks.verdicts(own.task, self.rows, written.texts, limits=limits)
        keep(
            [
                {"prompt": prompt, "completion": text, "verdict": mark if isinstance(mark, Mapping) else asdict(mark)}
                for prompt, texts, judged in zip(self.prompts, written.texts, marks, strict=True)
                for text, mark in zip(texts, judged, strict=True)
            ]
        )
        scores = benchmarks.figures_of(marks, own.k)
        return scores | {"cut_prompts": written.cut_prompts / len(self.prompts)}


def generation_benchmark(recipe: r.Recipe, bench: Probed) -> GenerationBenchmark | None:
    """The generation benchmark a recipe asks for; None without [generation]. Raises InputError as `read_benchmark`."""
    if recipe.generation is None:
        return None
    return read_benchmark(recipe.generation, bench, recipe.seed, recipe.data.train)


def read_benchmark(own: r.Generation, bench: Probed, seed: int, train: str = "") -> GenerationBenchmark:
    """A generation benchmark, read and asked. What could refuse it after hours of training refuses here.

    Args:
        own: its settings.
        bench: the model.
        seed: of samples and of the choice of worked examples.
        train: the file that worked examples come from where the settings name none.

    Raises:
        InputError: a file cannot be read, a row lacks what the task needs, there are too few worked examples, the
            model's context has no room for the completions, or programs cannot be run here.
    """
    rows = benchmarks.read_problems(own.task, Path(own.file))[: own.limit]
    if not rows:
        raise InputError(f"{own.file} has no problem to score", why="of MBPP, the ids 11 to 510 are scored")
    room_for_prompts(bench, own.max_new_tokens)
    if benchmarks.TASKS[own.task].program is not None:
        run_program("", "")
    examples = _examples(own, rows, seed, train)
    draws = derive(seed, "exam")
    if own.template == "chat":
        chats = tuple(_chat(bench, benchmarks.turns(own.task, row, examples, own.prompt)) for row in rows)
        return GenerationBenchmark(own, tuple(rows), chats, draws, opening=())
    asked = tuple(benchmarks.prompt(own.task, row, examples, own.prompt) for row in rows)
    return GenerationBenchmark(own, tuple(rows), asked, draws)


def _chat(bench: Probed, turns: list[dict[str, str]]) -> str:
    """The turns by the tokenizer's chat template, and the opening of the answer."""
    if not getattr(bench.tokenizer, "chat_template", None):
        raise InputError(
            "generation.template = 'chat', but the model's tokenizer has no chat template",
            fix="set generation.template = 'plain', or take a model that was tuned for chat",
        )
    try:
        return str(bench.tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True))
    except Exception as error:  # templates are programs: they raise what they like
        raise InputError(
            "the tokenizer's chat template refuses a prompt",
            why=f"{type(error).__name__}: {error}".splitlines()[0],
            fix="set generation.template = 'plain'",
        ) from None


def _examples(own: r.Generation, rows: list[benchmarks.Row], seed: int, train: str) -> list[benchmarks.Row]:
    if not own.shots:
        return []
    source = own.examples or (own.file if own.task == "mbpp" else train)
    if not Path(source).is_file():
        raise InputError(
            f"generation.shots = {own.shots}, but "
            + (
                f"'{source}' is no file to take worked examples from"
                if source
                else "no file of worked examples is given"
            ),
            fix="name one in generation.examples",
        )
    known = benchmarks.read_examples(own.task, Path(source))
    if own.task != "mbpp":  # a problem is no example for itself
        asked = {benchmarks.prompt(own.task, row) for row in rows}
        known = [row for row in known if benchmarks.prompt(own.task, row) not in asked]
    if len(known) < own.shots:
        raise InputError(f"generation.shots = {own.shots}, but {source} has {len(known)} examples that are not asked")
    if own.task == "mbpp":
        return known[: own.shots]
    chosen = np.random.default_rng(derive(seed, "shots")).permutation(len(known))[: own.shots]
    return [known[int(index)] for index in chosen]
