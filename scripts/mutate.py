"""Break each formula once and see that a test fails: a sign, a missing weight, a transpose, a skipped check.

    python scripts/mutate.py [--only WORD] [--part 1/2]

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

METHODS = "test_methods test_mixed_ranks test_rules test_beyond"
PARTIAL = "test_pruning test_heads test_partial"
TRAIN = "test_train test_data"
DROP_IN = "test_flower_faults test_flower_strategies"
ROBUST = "test_changes test_robust test_weighing"

# file, what stands there, what is put in its place, the tests that must notice
MUTATIONS = [
    ("score/glue.py", "labels.index(value)", "1 - labels.index(value)", "test_glue"),
    ("score/glue.py", "if number == -1:", "if False:", "test_glue"),
    ("score/glue.py", "0 <= number <= HIGHEST_SCORE", "0 <= number", "test_glue"),
    ("train/glue.py", "[given, task.columns, *", "[task.columns, *", "test_glue"),
    ("train/evaluate.py", "pos_label=1", "pos_label=0", "test_glue"),
    ("train/evaluate.py", "mse_loss(logits.squeeze(-1), labels,", "l1_loss(logits.squeeze(-1), labels,", "test_glue"),
    ("train/evaluate.py", "stats.spearmanr", "stats.pearsonr", "test_glue"),
    ("train/partition.py", "(score - least) / width", "score / width", "test_glue"),
    ("train/model.py", "            head.float()\n", "", "test_glue"),
    ("train/instructions.py", "token if counts else IGNORED", "token", "test_instructions"),
    ("train/instructions.py", "text) + end, True", "text), True", "test_instructions"),
    ("train/instructions.py", "if first >= settings.max_length:", "if False:", "test_instructions"),
    ("train/rows.py", "table = table.select(train.kept)", "pass", "test_instructions"),
    ("train/model.py", "| _magnitudes(self._layers)", "", "test_variants"),
    ("adapter_files.py", "\"use_dora\": card.dora", "\"use_dora\": False", "test_variants"),
    ("recipe_file.py", "strategy.facts.base != \"stays\"", "False", "test_variants"),
    ("aggregate/inputs.py", "rank if isinstance(rank, int) else rank[module]", "max(rank.values())", "test_variants"),
    ("strategy/flora_na.py", "ranks_of(state.adapter)", "max(ranks_of(state.adapter).values())", "test_variants"),
    ("train/data.py", "frame.iloc[int(found[1] or 0) :", "frame.iloc[0 :", TRAIN),
    ("aggregate/mean.py", "alpha=weight * (pair.scaling / scaling)", "alpha=weight", "test_contract"),
    ("aggregate/mean.py", "add_(pair.A, alpha=weight)", "add_(pair.A, alpha=weight * weight)", "test_contract"),
    ("aggregate/mean.py", "inputs.is_finite(B) and", "True or", "test_contract"),
    ("aggregate/inputs.py", "* (pair.scaling / scaling)", "", "test_contract"),
    ("aggregate/inputs.py", "[weight / total for", "[weight for", "test_contract"),
    ("aggregate/inputs.py", "total += weight * tensor.to(wide)", "total += tensor.to(wide)", "test_contract"),
    ("aggregate/inputs.py", "if pair.shape != expected.shape:", "if False:", "test_contract"),
    ("aggregate/inputs.py", "if not is_finite(tensor):", "if False:", "test_contract"),
    ("aggregate/stack.py", "c * B_u", "B_u", "test_contract"),
    ("aggregate/stack.py", "[1.0, 1.0])", "[1.0, -1.0])", "test_contract"),
    ("aggregate/project.py", "[weight]))", "[1.0]))", METHODS),
    ("aggregate/core.py", "ohj,hjk->ohk", "ohj,hkj->ohk", METHODS),
    ("aggregate/core.py", "inputs.average(trained, own,", "inputs.average(trained, [own[0]] * len(own),",
     METHODS),
    ("aggregate/half.py", "p.B.to(_wide(p.B)) * (w * p.scaling / kept.scaling)", "p.B * w", "test_contract"),
    ("aggregate/half.py", "p.A.to(_wide(p.A)) * (w * p.scaling / kept.scaling)", "p.A * w", "test_contract"),
    ("aggregate/pad.py", "* (pair.scaling / own)", "", METHODS),
    ("aggregate/pad.py", "weight * square**0.5", "square**0.5", METHODS),
    ("aggregate/gauge.py", "whole.left * whole.values", "whole.left", METHODS),
    ("aggregate/terms.py", "(1 - share) * tail[0]", "share * tail[0]", METHODS),
    ("aggregate/terms.py", "1 - error * error", "1 - error", METHODS),
    ("aggregate/terms.py", "linalg.between(whole, begin, stop)", "linalg.between(whole, 0, stop)", METHODS),
    ("aggregate/terms.py", "-(float(value) ** 2) / costs", "float(value) ** 2 / costs", "test_readme"),
    ("aggregate/terms.py", "linalg.stack([added.modules[name]], [1.0])", "linalg.stack([added.modules[name]], [-1.0])",
     METHODS),
    ("aggregate/accumulate.py", "(less, -1.0)", "(less, 1.0)", METHODS),
    ("strategy/rolora.py", "% 2 == 0", "% 2 == 1", METHODS),
    ("strategy/flora.py", "torch.zeros_like(pair.B)", "pair.B.clone()", METHODS),
    ("strategy/ranks.py", "if rank < len(whole.values) and", "if False and", METHODS),
    ("strategy/best_rank.py", "added=_kept(state.memory)", "added=None", METHODS),
    ("strategy/fedsvd.py", "A=orthonormal_rows(pair.A)", "A=pair.A.clone()", METHODS),
    ("strategy/frlora.py", "less=state.adapter", "less=None", METHODS),
    ("federation/messages.py", "| dict(own) | sent", "| sent", METHODS),
    ("federation/gate.py", "travelling(like, sent.work.up, sent.blocks)", "like.tensors()", "test_loop"),
    ("federation/gate.py", "travelling(like, sent.work.up, sent.blocks)", "travelling(like, sent.work.up)",
     PARTIAL),
    ("federation/gate.py", "lower if tensors[first].shape == wanted.shape else sent.adapter", "sent.adapter",
     PARTIAL),
    ("federation/gate.py", "if sent.pruning is None:", "if True:", PARTIAL),
    ("federation/messages.py", "whole[sorted(blocks)] = tensor", "whole[:] = tensor", PARTIAL),
    ("federation/messages.py", "known[name].clone()", "known[name]", PARTIAL),
    ("federation/messages.py", 't[sorted(blocks)] if kind_of(name) == "core" else t', "t", PARTIAL),
    ("federation/loop.py", "sent.residual, sent.blocks)", "sent.residual)", PARTIAL),
    ("aggregate/core.py", "part.blocks is None or k in part.blocks]", "True]", PARTIAL),
    ("aggregate/core.py", "if not any(part.weight > 0 for part in trained):", "if not trained:", PARTIAL),
    ("aggregate/core.py", "for part in frozen[1:]:", "for part in ():", PARTIAL),
    ("aggregate/pad.py", "norm(pair.B[:, rank:]) * norm(pair.A[rank:])", "norm(pair.B[:, rank:]) + norm(pair.A[rank:])",
     PARTIAL),
    ("strategy/hetlora.py", "max(1, math.floor(self.gamma * rank + 1e-9))", "math.floor(self.gamma * rank)",
     PARTIAL),
    ("strategy/hetlora.py", "if left is None else leading(state.adapter, int(left))", "", PARTIAL),
    ("strategy/base.py", "alive(adapter, state.adapter)", "adapter", METHODS),
    ("strategy/ranks.py", "alive(Adapter(modules, payload.adapter.extra), payload.adapter)",
     "Adapter(modules, payload.adapter.extra)", METHODS),
    ("aggregate/gauge.py", "(columns <= DEAD * columns.max()) &", "", METHODS),
    ("aggregate/gauge.py", "torch.where(dead[None, :], torch.zeros_like(pair.B), pair.B)", "pair.B", METHODS),
    ("strategy/hetlora.py", "{**state.memory, **own}", "own", PARTIAL),
    ("strategy/ravan.py", "blocks=order[:count]", "blocks=tuple(range(count))", PARTIAL),
    ("strategy/ravan.py", "state.round + 1, client, heads)", "0, client, heads)", PARTIAL),
    ("strategy/ravan.py", "max(1, rank // size)", "rank // size", PARTIAL),
    ("train/client.py", "loss if term is None else loss + term()", "loss", PARTIAL),
    ("train/client.py", "tail(after.modules, pruning.rank) < tail(before.modules, pruning.rank)",
     "tail(after.modules, pruning.rank) <= tail(before.modules, pruning.rank) + 1e9", PARTIAL),
    ("train/client.py", "self.bench.load(trained, residual, brief.trains)", "pass", PARTIAL),
    ("train/model.py", "trains, blocks)", "trains)", PARTIAL),
    ("plan.py", "p.work.up, p.blocks)", "p.work.up)", PARTIAL),
    ("plan.py", "+ sum(scales)", "", PARTIAL),
    ("strategy/ravan.py", "some.of(s) + count", "some.of(s)", METHODS),
    ("train/inserts.py", "...hk,hjk,h->...hj", "...hk,hkj,h->...hj", TRAIN),
    ("train/inserts.py", "copied(blocks * scale[:, None, None])", "copied(blocks)", TRAIN),
    ("train/model.py", "requires_grad_(letter in trains)", "requires_grad_(True)", TRAIN),
    ("train/beginnings.py", "-torch.sign(", "torch.sign(", TRAIN),
    ("module_patterns.py", r"\A(?:.*\.)?(?:{key})\z", r"(?:.*\.)?(?:{key})\z", "test_module_patterns"),
    ("module_patterns.py", r"\A(?:.*\.)?(?:{key})\z", r"\A(?:.*\.)?(?:{key})", "test_module_patterns"),
    ("module_patterns.py", "if piece is None:", "if False:", "test_module_patterns"),
    ("module_patterns.py", "if time.process_time() > until:", "if False:", "test_module_patterns"),
    ("module_patterns.py", "if len(key) > LONGEST:", "if False:", "test_module_patterns"),
    ("module_patterns.py", "if not left:", "if False:", "test_module_patterns"),
    ("module_patterns.py", "left = rest", "left = list(found)", "test_module_patterns"),
    ("module_patterns.py", "name.isascii() and", "", "test_module_patterns"),
    ("aggregate/terms.py", "(residuals, own, end)", "(residuals, own + 1, end)", "test_contract"),
    ("aggregate/power.py", "c * pair.scaling for", "c for", "test_power"),
    ("aggregate/power.py", "(self.weights[:, None] * (self.left.T @ U)).T", "(self.left.T @ U).T", "test_power"),
    ("aggregate/power.py", "V = W.T @ (across / theta)", "V = W.T @ across", "test_power"),
    ("aggregate/power.py", ")) ** 2 + float(gained)", ")) ** 2", "test_power"),
    ("aggregate/power.py", "return q / (1 - q)", "return q * (1 - q)", "test_power"),
    ("aggregate/power.py", "growths[-1] * _factor", "0.0 * _factor", "test_power"),
    ("aggregate/power.py", "(theta[rank:].square()", "(theta[rank - 1:].square()", "test_power"),
    ("aggregate/power.py", "if count <= 0:", "if True:", "test_power"),
    ("aggregate/power.py", "1 + JITTER * (2 * move - 1)", "1", "test_power"),
    ("aggregate/project.py", "if passes > 4:", "if passes < 4:", "test_power"),
    ("aggregate/project.py", "inputs.is_finite(first) and", "True or", "test_contract"),
    ("study/work.py", '.get("asked") == asked', '.get("asked") is not None', "test_swap"),
    ("study/work.py", "min(group.threads, torch.get_num_threads())", "group.threads", "test_study"),
    ("study/publish.py", "np.where(errors < EXACT, 0.0, errors)", "errors", "test_swap"),
    ("study/swap.py", "scored is None or round_ in scored", "True", "test_swap"),
    ("study/table.py", "targets.get(seed)", "_mean(list(targets.values()))", "test_study"),
    ("aggregate/direct.py", "wanted - B @ S", "wanted", "test_mix"),
    ("aggregate/direct.py", "wanted - S @ A", "wanted - A", "test_mix"),
    ("aggregate/direct.py", "move @ S)", "move)", "test_mix"),
    ("aggregate/direct.py", "residual - length * bent", "residual", "test_mix"),
    ("aggregate/direct.py", "+ B.T @ module.D_0", "", "test_mix"),
    ("aggregate/direct.py", "module.D_0 @ towards.sum(dim=0)  #", "0 * module.D_0 @ towards.sum(dim=0)  #", "test_mix"),
    ("aggregate/direct.py", "** 2 / PROBES", "** 2", "test_mix"),
    ("aggregate/blocks.py", "ivab,vba->i", "ivab,vab->i", "test_mix"),
    ("aggregate/blocks.py", "G[:, :1] + G[:, 1:]", "G[:, 1:]", "test_mix"),
    ("aggregate/blocks.py", "half[0] + half[1:]", "half[1:]", "test_mix"),
    ("aggregate/blocks.py", "block.G[0, 0] + block.G[:1, 1:]", "block.G[0, 0] - block.G[:1, 1:]", "test_mix"),
    ("aggregate/als.py", "@ (b - M @ x)[1:]", "@ (M @ x - b)[1:]", "test_mix"),
    ("aggregate/als.py", "p, q = p * ratio, q / ratio", "p, q = p * ratio, q * ratio", "test_mix"),
    ("aggregate/gradient.py", "if value < best:", "if True:", "test_mix"),
    ("aggregate/mix.py", "D, F = D - D_0, F - F_0", "D, F = D, F - F_0", "test_mix"),
    ("aggregate/mix.py", "D_u *= pair.scaling / scaling", "D_u *= scaling / pair.scaling", "test_mix"),
    ("aggregate/mix.py", "unit=1.0 / squares[name]", "unit=squares[name]", "test_mix"),
    ("aggregate/error.py", "sign=-1.0)", "sign=1.0)", "test_linalg"),
    ("aggregate/error.py", "values[pair.rank :]", "values[pair.rank + 1 :]", "test_linalg"),
    ("linalg.py", "(c * pair.scaling)", "c", "test_linalg"),
    ("linalg.py", "(part.values / scaling).sqrt()", "part.values / scaling", "test_linalg"),
    ("linalg.py", "whole.left[:, begin:end]", "whole.left[:, : end - begin]", "test_linalg"),
    ("strategy/oracle.py", "whole.adapter, whole.residual)", "whole.adapter)", "test_strategy"),
    ("strategy/flora_na.py", 'lambda state: state.adapter', 'lambda state: None', "test_strategy"),
    ("adapter_reader.py", "math.sqrt(rank) if rslora", "rank if rslora", "test_merge"),
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
    ("federation/wire.py", ".round().clamp", ".trunc().clamp", "test_wire"),
    ("federation/wire.py", "abs().amax(dim=1) / LEVELS", "abs().amax(dim=1) / 128", "test_wire"),
    ("federation/wire.py", "rows.abs().amax", "rows.amax", "test_wire"),
    ("federation/wire.py", "scale[:, None] > 0, rows", "scale[:, None] > 1e-9, rows", "test_wire"),
    ("federation/wire.py", "t.double() - received[name].double() for", "t.double() for", "test_wire"),
    ("federation/wire.py", "(received[name].double() + c)", "c", "test_wire"),
    ("federation/wire.py", "-(-t.numel() // BLOCK)", "t.numel() // BLOCK", "test_wire"),
    ("federation/uplink.py", "+ left[n][_blocks(n, brief)].double() if", "if", "test_wire"),
    ("federation/uplink.py", "wanted[name] - there[name].double()", "up[name] - there[name].double()", "test_wire"),
    ("federation/uplink.py", ".nan_to_num(0.0, 0.0, 0.0)", "", "test_wire"),
    ("federation/uplink.py", "if name.startswith(FEEDBACK)}", "if False}", "test_wire"),
    ("federation/uplink.py", "* second.scaling, torch", ", torch", "test_wire"),
    ("federation/uplink.py", "[A1, A1 - A]", "[A1, A - A1]", "test_wire"),
    ("federation/uplink.py", "sorted(brief.blocks) if", "list(brief.blocks) if", "test_wire"),
    ("federation/gate.py", "if bool((tensor < 0).any()):", "if False:", "test_wire"),
    ("federation/gate.py", "elif bool((tensor < -wire.LEVELS).any()):", "elif False:", "test_wire"),
    ("federation/gate.py", 'if uplink != "float32":  # the sum', "if False:  # the sum", "test_wire"),
    ("federation/gate.py", "sent.blocks), uplink))\n", 'sent.blocks), "float32"))\n', "test_wire"),
    ("train/client.py", "kept | dict(out.feedback)", "kept", "test_uplink"),
    ("federation/loop.py", '_weighted("uplink_error", kept, parts)', "0.01", "test_uplink"),
    ("plan.py", "recipe.federation.uplink)", '"float32")', "test_uplink"),
    ("strategy/best_rank.py", '    coordinates="move",\n', "", "test_uplink"),
    ("federation/gate.py", "if reply.round != expected.round:", "if False:", "test_loop"),
    ("federation/gate.py", "if reply.client in seen:", "if False:", "test_loop"),
    ("federation/gate.py", "if tensor.shape != expected.shape:", "if False:", "test_loop"),
    ("federation/gate.py", "if not size <= torch.finfo(torch.float32).max:", "if False:", "test_loop"),
    ("federation/loop.py", "key=lambda update: update.client)", "key=lambda update: 0)", "test_loop"),
    ("federation/weighing.py", "update.examples / total for", "1 / len(updates) for", "test_loop"),
    ("federation/journal.py", "if hashlib.sha256(data).hexdigest() != digest:", "if False:", "test_journal"),
    ("federation/journal.py", "r.round < last.round", "r.round <= last.round", "test_journal"),
    ("train/inserts.py", "self.scaling * F.linear", "F.linear", TRAIN),
    ("train/client.py", "torch.manual_seed(seed)", "pass", TRAIN),
    ("train/client.py", "- set(brief.returns) | (", "| (", TRAIN),
    ("train/tasks.py", "room // 2", "room", TRAIN),
    ("federation/gate.py", "moved[kind] > factor * median", "moved[kind] > factor", "test_flower_faults"),
    ("federation/gate.py", "statistics.median_low", "statistics.median_high", "test_flower_faults"),
    ("federation/gate.py", "if len(found) > 2 else", "if len(found) > 1 else", "test_flower_faults"),
    ("robust/changes.py", "moved[corner] = new - old[corner]", "moved[corner] = new", ROBUST),
    ("robust/changes.py", "right = [*left, old.B.double() * new.scaling], [*right, dA]", "right = left, right", ROBUST),
    ("robust/changes.py", "total += gram / unit", "total += gram", ROBUST),
    ("robust/line.py", "top = min(1.0, first) if", "top = 1.0 if", ROBUST),
    ("robust/line.py", "min(linear, _line(", "min(1.0, _line(", ROBUST),
    ("robust/rule.py", "value <= last * (1 + 1e-9)", "value < last", ROBUST),
    ("robust/clip.py", "statistics.median_low", "max", ROBUST),
    ("robust/multi_krum.py", ": len(gram) - hostile - 2]", ":]", ROBUST),
    ("robust/geometric_median.py", "- 0.5 * (beta @ towards)", "- 0.4 * (beta @ towards)", ROBUST),
    ("robust/geometric_median.py", "after = own / to_mean", "after = 1 / to_mean", ROBUST),
    ("robust/trimmed.py", "count - hostile), weights)", "count), weights)", ROBUST),
    ("robust/cap.py", "        full |= over", "        full = over", ROBUST),
    ("federation/weighing.py", "drawn_back(pair, share)", "pair[0]", ROBUST),
    ("federation/weighing.py", "usually(len(updates)) if how.most is None", "1.0 if how.most is None", ROBUST),
    ("federation/loop.py", "{**rows, **federation.examples}", "federation.examples", ROBUST),
    ("federation/reach.py", "(1 - first**t)) ** 2", "(1 - first**t))", ROBUST),
    ("federation/reach.py", "own = (1 + scale) * own", "own = own", ROBUST),
    ("federation/gate.py", "if beyond > 1:", "if False:", ROBUST),
    ("flower/roll.py", "said != known_rows", "False", "test_flower_roll"),
    ("flower/keys.py", "read_rows(files.roster) | ", "", "test_flower"),
    ("federation/loop.py", "del updates[client]", "pass", "test_flower_rounds"),
    ("federation/keeping.py", "if _round_of(path) < round_]", "]", "test_flower"),
    ("flower/briefs.py", "frame.fields.get(\"nonce\") != nonce", "False", "test_flower"),
    ("flower/briefs.py", "named[\"client\"] != client", "False", "test_flower"),
    ("flower/roll.py", "known and card.client != known", "False", "test_flower_roll"),
    ("flower/card.py", "mine != theirs", "False", "test_flower_roll"),
    ("flower/roll.py", "if different else", "if False else", "test_flower_roll"),
    ("flower/roll.py", "!= self.common.start", "== ''", "test_flower_roll"),
    ("flower/roll.py", "if key in names}", "if key in names or True}", "test_flower_roll"),
    ("flower/roll.py", "self.examples[card.client] = card, card.holds.train", "_ = card, 0", "test_flower_roll"),
    ("flower/card.py", "(-counts.count(same[card.client]), card.client)", "card.client", "test_flower_roll"),
    ("flower/site.py", "frame.fields.get(\"card\") != digest(self.card)", "False", "test_flower_roll"),
    ("flower/roll.py", "self._again.keys() - online.keys()", "set()", "test_flower_roll"),
    ("flower/roll.py", "+ ANEW", "+ 10**9", "test_flower_roll"),
    ("flower/engine.py", "until - time.monotonic()", "60.0", "test_flower_rounds"),
    ("flower/site.py", "brief.client != self.who", "False", "test_flower_rounds"),
    ("flower/frames.py", "if payload > limit:", "if False:", "test_flower"),
    ("flower/keys.py", "known == name and other != key", "False", "test_flower"),
    ("flower/keys.py", "path.stat().st_mode & 0o077", "False", "test_flower"),
    ("flower/settings.py", "if type(value) is not kind:", "if False:", "test_flower"),
    ("flower/arrays.py", "if declared != shape or", "if", "test_flower_arrays"),
    ("flower/arrays.py", "len(data) - 10 - length != size:", "False:", "test_flower_arrays"),
    ("flower/arrays.py", 'order="F" if fortran else "C"', 'order="C"', "test_flower_arrays"),
    ("flower/arrays.py", ".view(torch.bfloat16)", ".to(torch.bfloat16)", "test_flower_arrays"),
    ("flower/arrays.py", "len(array.data) != 2 * math.prod(shape)", "False", "test_flower_arrays"),
    ("flower/names.py", "math.sqrt(rank) if rslora", "rank if rslora", "test_flower_arrays"),
    ("flower/answers.py", "key=lambda client: fingerprint(updates[client])", "key=lambda client: 0",
     DROP_IN),
    ("flower/answers.py", "elif not (tensor.dtype == before[name].dtype and torch.equal(tensor, before[name])):",
     "elif False:", DROP_IN),
    ("flower/answers.py", "if said != digest:", "if False:", DROP_IN),
    ("flower/answers.py", "round=_round_of(message.metadata.group_id)", "round=expected.round",
     DROP_IN),
    ("flower/answers.py", "isinstance(value, list) else -1", "isinstance(value, list) else None",
     DROP_IN),
    ("flower/answers.py", "check_size(size_of(record), before)", "pass", DROP_IN),
    ("flower/lora_strategy.py", "            _require_finite(outcome)\n", "",
     DROP_IN),
    ("flower/lora_strategy.py", "record_names(self.adapter)", "record_names(outcome.state.adapter)",
     DROP_IN),
    ("flower/lora_strategy.py", "payloads[u.client].residual)", "None)", DROP_IN),
    ("flower/lora_strategy.py", "outcome.state.adapter, outcome.state.residual)", "outcome.state.adapter)",
     DROP_IN),
    ("flower/lora_strategy.py", "self.method.cut(whole, rank, scalings.pop())", "whole",
     DROP_IN),
    ("flower/following.py", 'kind == "extra" or kind in brief.trains', "True", "test_flower_following"),
    ("flower/following.py", "hook.remove()", "pass", "test_flower_following"),
    ("flower/following.py", "if stays:", "if False:", "test_flower_following"),
    ("flower/following.py", 'kind == "extra" or kind in brief.returns', "True", "test_flower_following"),
]  # fmt: skip


def paths(tests: str) -> list[str]:
    """The files of the named tests, first those that are likely to notice."""
    return [f"tests/{name}.py" for name in tests.split()]


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
        command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *paths(tests)]
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
        return done.returncode == 0


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--only", default="")
    parser.add_argument("--part", default="1/1", help="such as 2/3: every third mutation, from the second on")
    arguments = parser.parse_args()
    holes = 0
    part, parts = (int(number) for number in arguments.part.split("/"))
    chosen = [m for m in MUTATIONS if arguments.only in " ".join(m)][part - 1 :: parts]
    for file, old, new, tests in chosen:
        verdict = survives(file, old, new, tests)
        words = {None: "NOT FOUND", True: "SURVIVED", False: "killed"}[verdict]
        holes += verdict is not False
        print(f"{words:9}  {file}: {old}  ->  {new}  ({tests})", flush=True)
    print(f"{len(chosen) - holes} of {len(chosen)} mutations killed")
    sys.exit(1 if holes else 0)


if __name__ == "__main__":
    main()
