"""Instruction tuning: rows of prompts and responses as tokens, of which only the responses count in the loss.

Each row becomes turns (system, user, assistant). The plain template is

    [system text, empty line]
    ### Instruction:
    user text, with an input or context: [empty line] ### Input: [newline] the input
    [empty line] ### Response: [newline] assistant text, end token

and a tokenizer's own chat template stands in its place where the recipe asks for it. Every assistant turn counts, with
the mark that ends it; nothing else does. A prompt is never cut: a row longer than the window loses its end, and one
whose first prompt fills the window has nothing to learn from: an error, or a row left out and counted.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import datasets

from florana.errors import InputError
from florana.recipe import schema as r
from florana.train.data.tokenize import IGNORED, Example, kinds_of, tokens_of

COLUMNS: Mapping[str, tuple[tuple[str, str], str | None]] = {
    "alpaca": (("instruction", "output"), "input"),
    "dolly": (("instruction", "response"), "context"),
    "prompt-response": (("prompt", "response"), None),
}
"""Kind -> ((prompt, response), the column that may add to the prompt)."""

CHATS = {"messages": ("messages", "role", "content"), "sharegpt": ("conversations", "from", "value")}
"""Kind -> (column, and in each of its turns the role and the text)."""

ROLES = {"human": "user", "gpt": "assistant", "chatgpt": "assistant", "bot": "assistant"}
"""ShareGPT's names -> those of chat templates."""

Turn = tuple[str, str]
"""(role, text)."""


@dataclass(frozen=True, eq=False)
class Encoded:
    """A table's rows as tokens.

    Args:
        examples: of the rows that are kept.
        kept: their numbers in the table.
        left_out: how many are not.
        cut: how many of the kept ones lost their end.
    """

    examples: list[Example]
    kept: list[int]
    left_out: int = 0
    cut: int = 0


def required(settings: r.Data) -> list[str]:
    """The columns that the rows must have: the prompt's first."""
    kind = settings.instructions or ""
    if kind == "prompt-response" and not isinstance(settings.text, str):
        return list(settings.text)
    return [CHATS[kind][0]] if kind in CHATS else list(COLUMNS[kind][0])


def encode_instructions(table: datasets.Dataset, settings: r.Data, tokenizer: Any, source: str) -> Encoded:
    """The rows of a table as tokens, at most `max_length` each; labels on the responses alone.

    Raises:
        InputError: a row without prompt or response, messages in no proper order, a tokenizer without the chat template
            that is asked for, a template that refuses a row, prompts that fill the window (`too_long = "error"`).
    """
    kind, columns = settings.instructions, required(settings)
    assert kind is not None
    chat = settings.template == "chat"
    if chat and not getattr(tokenizer, "chat_template", None):
        raise InputError(
            "data.template = 'chat', but the model's tokenizer has no chat template",
            fix="set data.template = 'plain', or take a model that was tuned for chat",
        )
    examples: list[Example] = []
    kept: list[int] = []
    long: list[tuple[str, int]] = []
    cut = 0
    for number, row in enumerate(table):
        place = f"{source}, the row that begins {str(row[columns[0]])[:40]!r}"  # its number may be another
        if kind == "prompt-response":
            row = {"prompt": row[columns[0]], "response": row[columns[1]]}
        turns = turns_of(row, kind, place, plain=not chat)
        pieces = _chat_pieces(turns, tokenizer, place) if chat else _pieces(turns, tokenizer)
        ids = [token for piece, _ in pieces for token in piece]
        labels = [token if counts else IGNORED for piece, counts in pieces for token in piece]
        first = next((place for place, label in enumerate(labels) if label != IGNORED), len(labels))
        if first >= settings.max_length:
            long.append((place, first))
            continue
        cut += len(ids) > settings.max_length
        ids, labels = ids[: settings.max_length], labels[: settings.max_length]
        examples.append(Example(tuple(ids), kinds_of(tokenizer, len(ids)), tuple(labels)))
        kept.append(number)
    if long and (settings.too_long == "error" or not kept):
        raise InputError(
            f"{long[0][0]}: the prompt has {long[0][1]} tokens and leaves no room for a response"
            + (f"; so have {len(long) - 1} more of {len(table)} rows" if len(long) > 1 else ""),
            why=f"data.max_length is {settings.max_length}",
            fix="raise data.max_length, or set data.too_long = 'drop': such rows are then left out and counted",
        )
    return Encoded(examples, kept, len(long), cut)


def turns_of(row: Mapping[str, Any], kind: str, place: str, *, plain: bool) -> list[Turn]:
    """A row as turns.

    Raises:
        InputError: an empty prompt or response, a role nobody knows, turns that do not alternate or end unanswered.

    Examples:
        >>> turns_of({"instruction": "Add.", "input": "1 2", "output": "3"}, "alpaca", "row 1", plain=False)
        [('user', 'Add.\\n\\n1 2'), ('assistant', '3')]
    """
    if kind in CHATS:
        return _messages(row[CHATS[kind][0]], place, *CHATS[kind][1:])
    (asked, answered), more = COLUMNS[kind]
    prompt, response = str(row[asked]), str(row[answered])
    for column, text in ((asked, prompt), (answered, response)):
        if not text.strip():
            raise InputError(f"{place}: the column '{column}' is empty", fix="remove the row")
    added = str(row.get(more) or "") if more is not None else ""
    if added.strip():
        prompt += f"\n\n### Input:\n{added}" if plain else f"\n\n{added}"
    return [("user", prompt), ("assistant", response)]


def prompt_of(text: str, kind: str | None, template: str, tokenizer: Any) -> str:
    """A question as a model that was trained on such rows reads it, up to where its answer begins.

    Args:
        text: the question.
        kind: of the rows, as in `data.instructions`; None: the text stands as it is.
        template: `plain` or `chat`.
        tokenizer: with the chat template.

    Raises:
        InputError: the chat template refuses it.

    Examples:
        >>> prompt_of("Add 1 and 2.", "alpaca", "plain", None)
        '### Instruction:\\nAdd 1 and 2.\\n\\n### Response:\\n'
    """
    if kind is None:
        return text
    if template == "plain":
        return f"### Instruction:\n{text}\n\n### Response:\n"
    try:
        turns = [{"role": "user", "content": text}]
        return str(tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True))
    except Exception as error:  # templates are programs: they raise what they like
        raise InputError(
            "the tokenizer's chat template refuses the text", why=f"{type(error).__name__}: {error}".splitlines()[0]
        ) from None


def _messages(given: Any, place: str, speaker: str, spoken_text: str) -> list[Turn]:
    turns: list[Turn] = []
    for message in given if isinstance(given, Sequence) and not isinstance(given, str) else [None]:
        role, content = (message.get(key) for key in (speaker, spoken_text)) if isinstance(message, Mapping) else (0, 0)
        role = ROLES.get(role, role) if speaker == "from" and isinstance(role, str) else role
        if role not in ("system", "user", "assistant") or not isinstance(content, str) or not content.strip():
            raise InputError(
                f"{place}: {str(message)[:60]!r} is no message",
                why="a message has a role (system, user or assistant) and a content"
                if speaker == "role"
                else "a turn has `from` (system, human or gpt) and `value`",
            )
        turns.append((role, content))
    spoken = [role for role, _ in turns if role != "system"]
    orderly = spoken == ["user", "assistant"] * (len(spoken) // 2) and "system" not in [role for role, _ in turns[1:]]
    if not spoken or not orderly:
        raise InputError(
            f"{place}: the messages come as {', '.join(role for role, _ in turns) or 'an empty list'}",
            why="after a system message, which may be left out, user and assistant take turns; the assistant is last",
        )
    return turns


def _pieces(turns: Sequence[Turn], tokenizer: Any) -> list[tuple[list[int], bool]]:
    """(tokens, whether they count) by the plain template; pieces are read apart, as prompts are when a model writes."""
    begin = [tokenizer.bos_token_id] if tokenizer.bos_token_id is not None else []
    end = [tokenizer.eos_token_id] if tokenizer.eos_token_id is not None else []
    pieces, waiting = [], ""
    for role, text in turns:
        if role == "assistant":
            pieces += [(begin + tokens_of(tokenizer, waiting), False), (tokens_of(tokenizer, text) + end, True)]
            begin, waiting = [], "\n\n"
        else:
            waiting += f"{text}\n\n" if role == "system" else f"### Instruction:\n{text}\n\n### Response:\n"
    return pieces


def _chat_pieces(turns: Sequence[Turn], tokenizer: Any, place: str) -> list[tuple[list[int], bool]]:
    """(tokens, whether they count) by the tokenizer's chat template: what each assistant turn adds to its text."""
    messages = [{"role": role, "content": text} for role, text in turns]
    pieces, done = [], ""
    for index, (role, _) in enumerate(turns):
        if role != "assistant":
            continue
        try:
            before = str(tokenizer.apply_chat_template(messages[:index], tokenize=False, add_generation_prompt=True))
            whole = str(tokenizer.apply_chat_template(messages[: index + 1], tokenize=False))
        except Exception as error:  # templates are programs: they raise what they like
            raise InputError(
                f"{place}: the tokenizer's chat template refuses it",
                why=f"{type(error).__name__}: {error}".splitlines()[0],
                fix="set data.template = 'plain'",
            ) from None
        if not (before.startswith(done) and whole.startswith(before)):
            raise InputError(
                f"{place}: the tokenizer's chat template rewrites earlier turns",
                why="it cannot be told then which tokens are the response's",
                fix="set data.template = 'plain'",
            )
        pieces += [
            (tokens_of(tokenizer, before[len(done) :]), False),
            (tokens_of(tokenizer, whole[len(before) :]), True),
        ]
        done = whole
    return pieces
