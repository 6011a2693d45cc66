"""docs/models.md: every family's figures, from a run and from its adapter loaded by PEFT alone on a fresh base.

python scripts/family_table.py        # about two minutes on one core
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from tests.families import FAMILIES
from tests.test_models import figures

HEAD = """# Model families

florana trains what Transformers loads as `AutoModelForSequenceClassification` or `AutoModelForCausalLM`. The
families below are held to it by `tests/test_models.py`: a tiny model of each, saved as its real checkpoints are
(without a classifier), goes through a round of two clients; the adapter of the run folder is then loaded by PEFT
alone on a base whose missing layers were drawn from another seed, and must give the loss that `rounds.jsonl` has,
to 1e-4. Families beside these are checked when a run begins: two short texts go through the model, the adapter is
loaded back, and what would not come back is refused by name.

- **Layers that a checkpoint lacks** (a classifier, a pooler, a head's dense layer) are trained and saved whole. For
  `causal-lm` nothing may be missing.
- **Mixtures of experts** keep their experts in parameters that are no linear layers: `all-linear` is refused there,
  and the message names the targets that work.
- **Encoder-decoders** are classified whole; as `causal-lm` they need the checkpoint of a decoder: of a whole one
  Transformers leaves the decoder's embeddings random, which is refused.

| family | kind | task | target modules | loss in the run | loss of its adapter on a fresh base |
|---|---|---|---|---:|---:|
"""


def main() -> None:
    lines = []
    for name, family in FAMILIES.items():
        targets = family.targets if isinstance(family.targets, str) else ", ".join(family.targets)
        for task in family.tasks:
            with tempfile.TemporaryDirectory() as folder:
                told, (loss, _) = figures(family, task, Path(folder))
            shown = targets.replace("|", "\\|")
            lines.append(f"| {name} | {family.kind} | `{task}` | {shown} | {told['loss']:.5f} | {loss:.5f} |\n")
            print(lines[-1], end="", flush=True)
    (ROOT / "docs" / "models.md").write_text(HEAD + "".join(lines))


if __name__ == "__main__":
    main()
