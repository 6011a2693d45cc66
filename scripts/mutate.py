"""Break each formula once and see that a test fails: a sign, a missing weight, a transpose, a skipped check.

    python scripts/mutate.py [--only WORD]

Each mutation is made in a copy of the source, and the tests named beside it run on that copy. A mutation that survives
is a hole in the tests; the script then ends with code 1. About twenty minutes on two cores.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

# file, what stands there, what is put in its place, the tests that must notice
MUTATIONS = [
    ("aggregate/mean.py", "B += weight * B_u", "B += B_u", "test_contract"),
    ("aggregate/mean.py", "A += weight * A_u", "A += weight * weight * A_u", "test_contract"),
    ("aggregate/inputs.py", "* (pair.scaling / scaling)", "", "test_contract"),
    ("aggregate/inputs.py", "[weight / total for", "[weight for", "test_contract"),
    ("aggregate/inputs.py", "total += weight * tensor.to(wide)", "total += tensor.to(wide)", "test_contract"),
    ("aggregate/inputs.py", "if pair.shape != expected.shape:", "if False:", "test_contract"),
    ("aggregate/inputs.py", "if not bool(torch.isfinite(tensor.sum()))", "if False", "test_contract"),
    ("aggregate/stack.py", "c * B_u", "B_u", "test_contract"),
    ("aggregate/stack.py", "[1.0, 1.0])", "[1.0, -1.0])", "test_contract"),
    ("aggregate/project.py", "[1.0]))", "[-1.0]))", "test_strategy"),
    ("aggregate/project.py", "linalg.left_over(whole, rank,", "linalg.left_over(whole, rank + 1,", "test_contract"),
    ("aggregate/blocks.py", "ivab,vba->i", "ivab,vab->i", "test_mix"),
    ("aggregate/blocks.py", "G[:, :1] + G[:, 1:]", "G[:, 1:]", "test_mix"),
    ("aggregate/blocks.py", "half[0] + half[1:]", "half[1:]", "test_mix"),
    ("aggregate/blocks.py", "block.G[0, 0] + block.G[:1, 1:]", "block.G[0, 0] - block.G[:1, 1:]", "test_mix"),
    ("aggregate/als.py", "@ (b - M @ x)[1:]", "@ (M @ x - b)[1:]", "test_mix"),
    ("aggregate/als.py", "p, q = p * ratio, q / ratio", "p, q = p * ratio, q * ratio", "test_mix"),
    ("aggregate/gradient.py", "if value < best:", "if True:", "test_mix"),
    ("aggregate/mix.py", "(B_u - B_0 for B_u in Bs)", "(B_u for B_u in Bs)", "test_mix"),
    ("aggregate/mix.py", "unit=1.0 / squares[name]", "unit=squares[name]", "test_mix"),
    ("aggregate/error.py", "sign=-1.0)", "sign=1.0)", "test_linalg"),
    ("aggregate/error.py", "values[pair.rank :]", "values[pair.rank + 1 :]", "test_linalg"),
    ("linalg.py", "(c * pair.scaling)", "c", "test_linalg"),
    ("linalg.py", "(part.values / scaling).sqrt()", "part.values / scaling", "test_linalg"),
    ("linalg.py", "whole.left[:, rank:end]", "whole.left[:, :end - rank]", "test_linalg"),
    ("strategy/oracle.py", "whole.adapter, whole.remainder)", "whole.adapter)", "test_strategy"),
    ("strategy/flora_na.py", 'lambda state: state.adapter', 'lambda state: None', "test_strategy"),
    ("adapter_reader.py", "math.sqrt(rank) if config", "rank if config", "test_merge"),
    ("adapter_config.py", 'config.get("alpha_pattern") or {}', "{}", "test_merge"),
    ("adapter_config.py", 'config.get("rank_pattern") or {}', "{}", "test_merge"),
    ("adapter_config.py", "value == math.floor(value)", "True", "test_adapter_files"),
    ("adapter_config.py", "object_pairs_hook=no_twins", "object_pairs_hook=dict", "test_adapter_files"),
    ("adapter_config.py", "isinstance(config.get(setting), bool | None)", "True", "test_adapter_files"),
    ("adapter_config.py", "return (value,) if isinstance(value, str) else", "return", "test_adapter_files"),
    ("adapter_reader.py", "if owner.get(key) != shard:", "if False:", "test_adapter_files"),
    ("adapter_reader.py", "for key in owner.keys() - places.keys():", "for key in ():", "test_adapter_files"),
    ("tensor_files.py", 'base + int(entry["data_offsets"][0])', "base", "test_adapter_files"),
    ("tensor_files.py", "if not math.isfinite(float(tensor.sum())) and", "if False and", "test_adapter_files"),
    ("tensor_files.py", "object_pairs_hook=no_twins", "object_pairs_hook=dict", "test_adapter_files"),
    ("aggregate/measured.py", "mul_(coefficient * pair.scaling)", "mul_(coefficient)", "test_measured"),
    ("aggregate/measured.py", "product.addmm_(part.left", "product.copy_(part.left", "test_measured"),
    ("aggregate/measured.py", "product.addmm_(part.left, part.right)", "product.sub_(part.left @ part.right)",
     "test_measured"),
    ("aggregate/measured.py", "root / (squares * scaling)", "root / squares", "test_measured"),
    ("aggregate/measured.py", "least = grams.whole - float(squares.sum())", "least = grams.whole - float(squares[0])",
     "test_measured"),
    ("aggregate/measured.py", "if grams.coarse > _shows(least, grams.whole) or", "if", "test_measured"),
    ("aggregate/measured.py", "if provable else", "if True else", "test_measured"),
    ("aggregate/measured.py", "missed = grams.whole - 2 * cross", "missed = grams.whole - cross", "test_measured"),
    ("aggregate/measured.py", "E, F = X - B, Y - A", "E, F = X - B, Y - Y", "test_measured"),
    ("aggregate/measured.py", "(V * values.clamp_min(0.0).sqrt())", "V", "test_measured"),
    ("aggregate/measured.py", "lower = vectors * values", "lower = vectors.T * values", "test_measured"),
    ("aggregate/measured.py", "float(squares[pair.rank :].clamp_min(0.0).sum())", "0.0", "test_measured"),
    ("merge.py", "reader.modules[name].scaling / scaling", "1.0", "test_merge"),
    ("merge.py", "(answer.missed for", "(answer.least for", "test_merge_scale"),
    ("merge.py", "(answer.least for", "(answer.missed for", "test_merge_scale"),
    ("merge.py", "a.whole / whole", "a.whole", "test_merge_scale"),
    ("merge.py", "torch.set_num_threads(1)", "pass", "test_merge_scale"),
    ("merge.py", "(w * tensor.double()", "(tensor.double()", "test_merge"),
    ("federation/gate.py", "if reply.round != expected.round:", "if False:", "test_loop"),
    ("federation/gate.py", "if reply.client in seen:", "if False:", "test_loop"),
    ("federation/gate.py", "if tensor.shape != expected.shape:", "if False:", "test_loop"),
    ("federation/gate.py", "if not size <= torch.finfo(torch.float32).max:", "if False:", "test_loop"),
    ("federation/loop.py", "key=lambda update: update.client)", "key=lambda update: 0)", "test_loop"),
    ("federation/loop.py", "update.examples / total for", "1 / len(updates) for", "test_loop"),
    ("federation/journal.py", "if hashlib.sha256(data).hexdigest() != digest:", "if False:", "test_journal"),
    ("federation/journal.py", "r.round < last.round", "r.round <= last.round", "test_journal"),
    ("train/model.py", "self.scaling * F.linear", "F.linear", "test_train"),
    ("train/client.py", "torch.manual_seed(seed)", "pass", "test_train"),
    ("train/client.py", "memory or self._first_head", "memory", "test_train"),
    ("train/tasks.py", "room // 2", "room", "test_train"),
]  # fmt: skip


def survives(file: str, old: str, new: str, tests: str) -> bool | None:
    """Whether the tests pass with the mutation; None where its text is no longer in the file."""
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "src"
        shutil.copytree(ROOT / "src", source, ignore=shutil.ignore_patterns("__pycache__"))
        path = source / "florana" / file
        text = path.read_text()
        if old not in text:
            return None
        path.write_text(text.replace(old, new, 1))
        environment = {**os.environ, "PYTHONPATH": str(source), "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
        command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", f"tests/{tests}.py"]
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
        return done.returncode == 0


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--only", default="")
    arguments = parser.parse_args()
    holes = 0
    chosen = [m for m in MUTATIONS if arguments.only in " ".join(m)]
    for file, old, new, tests in chosen:
        verdict = survives(file, old, new, tests)
        words = {None: "NOT FOUND", True: "SURVIVED", False: "killed"}[verdict]
        holes += verdict is not False
        print(f"{words:9}  {file}: {old}  ->  {new}  ({tests})", flush=True)
    print(f"{len(chosen) - holes} of {len(chosen)} mutations killed")
    sys.exit(1 if holes else 0)


if __name__ == "__main__":
    main()
