"""Text written by the model on the bench: greedy or sampled, in batches, the same for the same seed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import Tensor

from florana.errors import InputError
from florana.federation.sampling import derive
from florana.score.code_tasks import cut_at
from florana.train.data.tokenize import batches, kinds_of
from florana.train.probe import Probed, pads_left


@dataclass(frozen=True)
class Written:
    """Completions, `samples` of them for each prompt, and how many prompts lost their beginning to fit the model."""

    texts: tuple[tuple[str, ...], ...]
    cut_prompts: int


def generate(
    bench: Probed,
    prompts: Sequence[str],
    *,
    max_new_tokens: int,
    stops: Sequence[str] = (),
    temperature: float = 0.0,
    samples: int = 1,
    seed: int = 0,
    batch_size: int = 16,
    opening: Sequence[int] | None = None,
) -> Written:
    """Continue every prompt, up to a stop sequence (left out), the end token or `max_new_tokens`.

    Each completion draws from a generator of its own, seeded by (seed, prompt number, sample number), by the Gumbel-max
    rule: argmax(logits / temperature + Gumbel noise) is a draw from the softmax. So it does not depend on what else is
    in its batch. A prompt too long for the model's context loses its beginning, as in lm-eval.

    Args:
        bench: the model and its tokenizer.
        prompts: the texts to continue.
        max_new_tokens: the most tokens of one completion.
        stops: texts that end a completion.
        temperature: of the softmax; 0 is greedy.
        samples: completions per prompt.
        seed: of the draws.
        batch_size: completions written at once.
        opening: tokens before every prompt; the beginning token, where the tokenizer has one, if None. A prompt made by
            a chat template has its own: ().

    Raises:
        InputError: `max_new_tokens` leaves no room for a prompt.
    """
    room = room_for_prompts(bench, max_new_tokens)
    encoded = [_encode(bench.tokenizer, text, opening) for text in prompts]
    begin = len(_encode(bench.tokenizer, "", opening))
    fitting = [ids if len(ids) <= room else ids[:begin] + ids[begin + len(ids) - room :] for ids in encoded]
    jobs = [(row, sample) for row in range(len(prompts)) for sample in range(samples)]
    jobs.sort(key=lambda job: len(fitting[job[0]]))  # little padding; stable, so always the same order
    texts: dict[tuple[int, int], str] = {}
    bench.model.eval()
    for batch in batches(jobs, batch_size, lambda job: len(fitting[job[0]]), together=pads_left(bench)):
        draws = [derive(seed, "generation", row, sample) for row, sample in batch] if temperature > 0 else []
        ids = [fitting[row] for row, _ in batch]
        written = _continue(bench, ids, max_new_tokens, stops, temperature, draws)
        texts |= {job: cut_at(text, stops) for job, text in zip(batch, written, strict=True)}
    return Written(
        tuple(tuple(texts[row, sample] for sample in range(samples)) for row in range(len(prompts))),
        sum(len(ids) > room for ids in encoded),
    )


def cut_prompts(
    bench: Probed, prompts: Sequence[str], max_new_tokens: int, opening: Sequence[int] | None = None
) -> int:
    """How many of the prompts are too long for the model's context when that many tokens are to follow."""
    room = room_for_prompts(bench, max_new_tokens)
    return sum(len(_encode(bench.tokenizer, text, opening)) > room for text in prompts)


def room_for_prompts(bench: Probed, new: int) -> int:
    """The tokens a prompt may have when `new` ones are to follow. Raises InputError where none is left."""
    context = getattr(bench.model.config, "max_position_embeddings", None) or 2**31
    if new >= context - 1:
        raise InputError(
            f"generation.max_new_tokens is {new}, but the model's context has {context} tokens",
            fix=f"lower it, to leave room for the prompts: {max(1, context // 2)} for instance",
        )
    return int(context - new)


def _encode(tokenizer: Any, text: str, opening: Sequence[int] | None) -> list[int]:
    """As in training (`tokenize.encode_language`): a beginning token where there is one, then the text's own tokens."""
    begin = [tokenizer.bos_token_id] if tokenizer.bos_token_id is not None else []
    ids = (begin if opening is None else list(opening)) + list(tokenizer(text, add_special_tokens=False)["input_ids"])
    return ids or ([] if not text else [tokenizer.pad_token_id])


def _continue(
    bench: Probed, prompts: list[list[int]], new: int, stops: Sequence[str], temperature: float, draws: list[int]
) -> list[str]:
    """One batch, padded on the left."""
    tokenizer, width = bench.tokenizer, max(len(ids) for ids in prompts)
    ids = torch.tensor([[tokenizer.pad_token_id] * (width - len(row)) + row for row in prompts], device=bench.device)
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in prompts], device=bench.device)
    ends = bench.model.generation_config.eos_token_id
    ends = tokenizer.eos_token_id if ends is None else ends
    with torch.inference_mode():
        out = bench.model.generate(
            input_ids=ids,
            attention_mask=mask,
            **bench.accepted({"token_type_ids": torch.zeros_like(ids)} if kinds_of(tokenizer, 1) else {}),
            generation_config=transformers.GenerationConfig(
                # What a model's own file may set otherwise is set here: a score is not to depend on it.
                do_sample=False,
                num_beams=1,
                repetition_penalty=1.0,
                no_repeat_ngram_size=0,
                max_new_tokens=new,
                max_length=None,
                pad_token_id=tokenizer.pad_token_id,
                eos_token_id=ends,
                use_cache=True,
            ),
            logits_processor=[_Gumbel(draws, temperature)] if draws else [],
            stopping_criteria=[_Stopped(tokenizer, stops, width)] if stops else [],
        )
    final = {ends} if isinstance(ends, int) else set(ends or ())
    return [_text(tokenizer, row, out[index, width:].tolist(), final) for index, row in enumerate(prompts)]


def _text(tokenizer: Any, prompt: list[int], new: list[int], ends: set[int]) -> str:
    """The new tokens' text, read after the prompt: alone, sentence-piece tokenizers would drop a leading space."""
    length = next((place for place, token in enumerate(new) if token in ends), len(new))

    def read(ids: list[int]) -> str:
        return str(tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))

    before, whole = read(prompt), read(prompt + new[:length])
    return whole[len(before) :] if whole.startswith(before) else read(new[:length])


class _Gumbel(transformers.LogitsProcessor):  # type: ignore[misc]
    """Turns the greedy choice into a draw: each row adds noise from its own generator, on the CPU on every device."""

    def __init__(self, seeds: Sequence[int], temperature: float) -> None:
        self.temperature = temperature
        self.generators = [torch.Generator().manual_seed(seed % 2**63) for seed in seeds]

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        noise = torch.stack(
            [torch.empty(scores.shape[-1]).exponential_(generator=generator) for generator in self.generators]
        )
        return scores.float() / self.temperature - noise.clamp_min(1e-30).log().to(scores.device)


class _Stopped(transformers.StoppingCriteria):  # type: ignore[misc]
    """A row is done when a stop sequence stands in the end of what it has written."""

    def __init__(self, tokenizer: Any, stops: Sequence[str], width: int) -> None:
        self.tokenizer, self.stops, self.width = tokenizer, stops, width
        self.tail = max(len(stop) for stop in stops) + 8  # a token has a letter at least, but for a few of bytes

    def __call__(self, input_ids: Tensor, scores: Tensor, **options: Any) -> Tensor:
        ends = input_ids[:, self.width :][:, -self.tail :].tolist()
        texts = [self.tokenizer.decode(row, clean_up_tokenization_spaces=False) for row in ends]
        return torch.tensor([any(stop in text for stop in self.stops) for text in texts], device=input_ids.device)
