"""Break each formula once and see that a test fails: a sign, a missing weight, a transpose, a skipped check.

Of the mathematics alone, each by the function that it stands in; `scripts/mutants.py` gives any other file to a mutation tool.

    python scripts/mutate.py [--only WORD] [--part 1/2]

Each mutation is made in a copy of the source, and the tests named beside it run on that copy. A mutation that survives
is a hole in the tests; the script then ends with code 1. Some fifteen minutes on two cores.
"""

from __future__ import annotations

import argparse
import ast
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
PUBLISHED = "test_as_published"
DROP_IN = "test_flower_faults test_flower_strategies"
ROBUST = "test_changes test_robust test_weighing"

# file, function or class (empty: the module), what stands there, what is put in its place, the tests that must notice
# fmt: off
MUTATIONS = [
    ("dp/accounting.py", "epsilon_of", "+= kind.steps", "= kind.steps", "test_private"),
    ("dp/accounting.py", "_event", "PoissonSampledDpEvent(rate, once)", "PoissonSampledDpEvent(rate * rate, once)", "test_private"),
    ("dp/accounting.py", "_noise", "if cost <= epsilon", "if cost <= 2 * epsilon", "test_private"),
    ("dp/noise.py", "Draws.chosen", "< rate", "< rate * rate", "test_private"),
    ("dp/noise.py", "Draws.normal", "drawn.reshape(shape)", "1.1 * drawn.reshape(shape)", "test_private"),
    ("dp/ledger.py", "Ledger.add", "os.fsync(stream.fileno())", "pass", "test_private"),
    ("dp/ledger.py", "Ledger.add", 'os.fdopen(handle, "ab")', 'os.fdopen(handle, "ab", buffering=0)', "test_private"),
    ("atomic_files.py", "without_torn_line", "stream.truncate(whole)", "pass", "test_private test_secure_sites"),
    ("train/private_steps.py", "clipped_rows", "clip / whole.clamp(min=clip)", "1.0 + 0 * whole", "test_private"),
    ("train/private_steps.py", "clipped_rows", "torch.linalg.vector_norm(norms, dim=0)", "norms[0]", "test_private"),
    ("train/private_steps.py", "train_privately", "noise.multiplier * noise.clip * drawn", "noise.multiplier * drawn", "test_private"),
    ("train/private_steps.py", "train_privately", ") / expected)[None]", ") / max(1, len(taken)))[None]", "test_private"),
    ("train/private_clients.py", "PrivateClients._require", "if after > self.budget.epsilon:", "if False:", "test_private"),
    ("train/private_clients.py", "PrivateClients.fit", "replace(brief, evaluate=False)", "brief", "test_private"),
    ("train/private_clients.py", "PrivateClients.fit", "if name not in HIDDEN", "", "test_private"),
    ("train/client_clip.py", "clipped", "if not whole > most", "if whole > most", "test_noisy_sums"),
    ("train/client.py", "TrainingClients.answer", "if self.clip is not None", "if False", "test_noisy_sums"),
    ("federation/noisy_mean.py", "noisy_mean", "min(1.0, clip / max(size, 1e-300))", "1.0", "test_noisy_sums"),
    ("federation/noisy_mean.py", "noisy_mean", "multiplier * clip *", "multiplier *", "test_noisy_sums"),
    ("federation/noisy_mean.py", "noisy_mean", ") / asked)", ") / max(1, len(updates)))", "test_noisy_sums"),
    ("federation/hidden_part.py", "hidden", "min(1.0, clip / max(size, 1e-300))", "1.0", "test_noisy_sums"),
    ("federation/hidden_part.py", "spread_of", "minimum - 1", "minimum", "test_noisy_sums"),
    ("runs/noisy_sums.py", "hiding_of", "if after > budget.epsilon", "if False", "test_noisy_sums"),
    ("runs/noisy_sums.py", "noising_of", "Mechanism(1.0, sigma, sums.trips)", "Mechanism(1.0, sigma, 1)", "test_noisy_sums"),
    ("dp/audit_bound.py", "chance", "right - 1, guesses", "right, guesses", "test_canaries"),
    ("dp/audit_bound.py", "chance", "2 * rows * delta", "delta", "test_canaries"),
    ("train/canaries.py", "guessed", "(~inside[:quarter])", "inside[:quarter]", "test_canaries"),
    ("train/canaries.py", "explained_by", "gradients @ moved", "gradients @ (0 * moved)", "test_canaries"),
    ("runs/canary_audit.py", "_joined", "if inside]", "]", "test_canaries"),
    ("runs/private_runs.py", "site_ledger", "any(folder.iterdir())", "False", "test_private"),
    ("score/glue.py", "glue_label", "labels.index(value)", "1 - labels.index(value)", "test_glue"),
    ("score/glue.py", "glue_label", "if number == -1:", "if False:", "test_glue"),
    ("score/glue.py", "glue_label", "0 <= number <= HIGHEST_SCORE", "0 <= number", "test_glue"),
    ("train/evaluate.py", "class_figures", "pos_label=1", "pos_label=0", "test_glue"),
    ("train/evaluate.py", "evaluate", "mse_loss(logits.squeeze(-1), labels,", "l1_loss(logits.squeeze(-1), labels,", "test_glue"),
    ("train/evaluate.py", "correlations", "stats.spearmanr", "stats.pearsonr", "test_glue"),
    ("train/data/partition.py", "binned", "(score - least) / width", "score / width", "test_glue"),
    ("aggregate/validate.py", "rank_in", "rank if isinstance(rank, int) else rank[module]", "max(rank.values())", "test_variants"),
    ("strategy/flora_na.py", "_Step.__call__", "ranks_of(state.adapter)", "max(ranks_of(state.adapter).values())", "test_variants"),
    ("aggregate/mean.py", "mean_of_b", "alpha=weight * (pair.scaling / scaling)", "alpha=weight", "test_contract"),
    ("aggregate/mean.py", "mean_of_a", "add_(pair.A, alpha=weight)", "add_(pair.A, alpha=weight * weight)", "test_contract"),
    ("aggregate/mean.py", "mean", "validate.is_finite(B) and", "True or", "test_contract"),
    ("aggregate/validate.py", "unscaled", "* (pair.scaling / scaling)", "", "test_contract"),
    ("aggregate/validate.py", "normalised", "[weight / total for", "[weight for", "test_contract"),
    ("aggregate/validate.py", "average", "total += weight * tensor.to(wide)", "total += tensor.to(wide)", "test_contract"),
    ("aggregate/validate.py", "matched", "if pair.shape != expected.shape:", "if False:", "test_contract"),
    ("aggregate/validate.py", "require_finite", "if not is_finite(tensor):", "if False:", "test_contract"),
    ("aggregate/stack.py", "concatenate", "c * B_u", "B_u", "test_contract"),
    ("aggregate/stack.py", "combined", "[1.0, 1.0])", "[1.0, -1.0])", "test_contract"),
    ("aggregate/best_rank/project.py", "terms", "(frozen.modules[name], weight)", "(frozen.modules[name], 1.0)", METHODS),
    ("aggregate/cores.py", "fold", "ohj,hjk->ohk", "ohj,hkj->ohk", METHODS),
    ("aggregate/cores.py", "_mean_block", "validate.average(trained, own,", "validate.average(trained, [own[0]] * len(own),", METHODS),
    ("aggregate/shared_factor.py", "mean_of_B", "p.B.to(_wide(p.B)) * (w * p.scaling / kept.scaling)", "p.B * w", "test_contract"),
    ("aggregate/shared_factor.py", "mean_of_A", "p.A.to(_wide(p.A)) * (w * p.scaling / kept.scaling)", "p.A * w", "test_contract"),
    ("aggregate/heterogeneous.py", "leading", "* (pair.scaling / own)", "", METHODS),
    ("aggregate/heterogeneous.py", "norm_weighted_mean", "weight * square**0.5", "square**0.5", METHODS),
    ("aggregate/factorization.py", "orthonormal_pair", "whole.left * whole.values", "whole.left", METHODS),
    ("aggregate/best_rank/truncate.py", "by_energy.choose", "(1 - share) * tail[0]", "share * tail[0]", METHODS),
    ("aggregate/best_rank/truncate.py", "by_error", "1 - error * error", "1 - error", METHODS),
    ("aggregate/best_rank/truncate.py", "divided", "linalg.between(whole, begin, stop)", "linalg.between(whole, 0, stop)", METHODS),
    ("aggregate/best_rank/truncate.py", "by_budget.choose", "-(float(value) ** 2) / costs", "float(value) ** 2 / costs", "test_readme"),
    ("aggregate/best_rank/truncate.py", "divided", "linalg.stack([added.modules[name]], [1.0])", "linalg.stack([added.modules[name]], [-1.0])", METHODS),
    ("aggregate/carried.py", "added", "(less, -1.0)", "(less, 1.0)", METHODS),
    ("strategy/rolora.py", "_odd", "% 2 == 0", "% 2 == 1", METHODS),
    ("strategy/flora.py", "_Step.__call__", "torch.zeros_like(pair.B)", "pair.B.clone()", METHODS),
    ("strategy/flora.py", "_Step.__call__", "_spreads(state.adapter) | dict(state.memory)", "_spreads(state.adapter)", PUBLISHED),
    ("strategy/fedrot.py", "_InTurn.__call__", "if state.round == 0:", "if False:", PUBLISHED),
    ("strategy/fedrot.py", "_InTurn.__call__", "state.round % 2 == 1", "state.round % 2 == 0", PUBLISHED),
    ("strategy/fedrot.py", "_InTurn.__call__", "if _IN_TURN not in state.memory:", "if False:", PUBLISHED),
    ("strategy/florist.py", "_fewer", "min(most, max(1, outgoing))", "most", PUBLISHED),
    ("strategy/florist.py", "_fewer", "max(1, outgoing)", "outgoing", PUBLISHED),
    ("strategy/florist.py", "_Step.__call__", "if len(parts) == 1:", "if False:", PUBLISHED),
    ("strategy/fed_sb.py", "build", "_one_step_in if", "_spanned if", PUBLISHED),
    ("aggregate/rotate.py", "rotation", "torch.linalg.det(left @ right).sign()", "1.0", PUBLISHED),
    ("aggregate/rotate.py", "softened", "(1 - strength) * torch.eye", "strength * torch.eye", PUBLISHED),
    ("strategy/ranks.py", "best_and_rest", "min(rank, pair.rank)", "rank", PUBLISHED),
    ("strategy/ranks.py", "best_and_rest", "if own < len(whole.values) and", "if False and", METHODS),
    ("strategy/best_rank.py", "_Step.__call__", "added=_kept(state.memory)", "added=None", METHODS),
    ("strategy/fedsvd.py", "_init", "A=orthonormal_rows(pair.A)", "A=pair.A.clone()", METHODS),
    ("strategy/frlora.py", "_Step.__call__", "less=state.adapter", "less=None", METHODS),
    ("aggregate/cores.py", "_mean_block", "part.blocks is None or k in part.blocks]", "True]", PARTIAL),
    ("aggregate/cores.py", "_mean_block", "if not any(part.weight > 0 for part in trained):", "if not trained:", PARTIAL),
    ("aggregate/cores.py", "_mean_block", "for part in frozen[1:]:", "for part in ():", PARTIAL),
    ("aggregate/heterogeneous.py", "tail", "norm(pair.B[:, rank:]) * norm(pair.A[rank:])", "norm(pair.B[:, rank:]) + norm(pair.A[rank:])", PARTIAL),
    ("strategy/hetlora.py", "_Pruned._leave", "max(1, math.floor(self.gamma * rank + 1e-9))", "math.floor(self.gamma * rank)", PARTIAL),
    ("strategy/hetlora.py", "_Pruned.brief", "if left is None else leading(state.adapter, int(left))", "", PARTIAL),
    ("strategy/base.py", "advance", "revive(adapter, state.adapter)", "adapter", METHODS),
    ("strategy/ranks.py", "best_and_rest", "revive(Adapter(modules, payload.adapter.extra), payload.adapter)", "Adapter(modules, payload.adapter.extra)", METHODS),
    ("aggregate/factorization.py", "_alive_pair", "(columns <= DEAD_BELOW * columns.max()) &", "", METHODS),
    ("aggregate/factorization.py", "_alive_pair", "torch.where(dead[None, :], torch.zeros_like(pair.B), pair.B)", "pair.B", METHODS),
    ("strategy/hetlora.py", "_Pruned.step", "{**state.memory, **own}", "own", PARTIAL),
    ("strategy/ravan.py", "build.brief", "blocks=order[:count]", "blocks=tuple(range(count))", PARTIAL),
    ("strategy/ravan.py", "build.brief", "state.round + 1, client, heads)", "0, client, heads)", PARTIAL),
    ("strategy/ravan.py", "build.cut", "max(1, rank // size)", "rank // size", PARTIAL),
    ("train/optimizer.py", "optimizer_of", "rate * settings.loraplus_lr_ratio", "rate", "test_local_training"),
    ("train/optimizer.py", "curve", "(round_ - 1) * steps", "0", "test_local_training"),
    ("train/local_loss.py", "predictions", "row.labels[1:]", "row.labels", "test_readme"),
    ("train/local_loss.py", "smoothed", "logits[:, :-1]", "logits[:, 1:]", "test_local_training"),
    ("train/local_loss.py", "proximal.term", "0.5 * mu", "mu", "test_local_training"),
    ("federation/step_bounds.py", "clipped_sgd", "momentum * (1.0 - momentum**steps) / rest", "0.0 * steps", "test_local_training"),
    ("federation/best.py", "best_round", "value < found[0]", "value <= found[0]", "test_best"),
    ("federation/best.py", "enough", ">= patience", "> patience", "test_best"),
    ("federation/best.py", "_values", "1.0 if by in LOWER_IS_BETTER else -1.0", "1.0", "test_best"),
    ("federation/journal.py", "Journal.commit", "if round_ != kept:", "if True:", "test_best"),
    ("study/estimates.py", "holm", "(count - place) * p", "count * p", "test_tune"),
    ("study/estimates.py", "holm", "max(highest, min(1.0,", "max(0.0, min(1.0,", "test_tune"),
    ("study/tune.py", "_rank", "else -candidate.figure", "else candidate.figure", "test_tune"),
    ("strategy/ravan.py", "build", "some.of(s) + count", "some.of(s)", METHODS),
    ("train/hooks.py", "Core.__call__", "...hk,hjk,h->...hj", "...hk,hkj,h->...hj", TRAIN),
    ("train/hooks.py", "Core.value", "copied(blocks * scale[:, None, None])", "copied(blocks)", TRAIN),
    ("train/lora_init.py", "gradient", "-rate * torch.sign(", "rate * torch.sign(", TRAIN),
    ("aggregate/best_rank/truncate.py", "divided", "(residuals, own, end)", "(residuals, own + 1, end)", "test_contract"),
    ("aggregate/best_rank/sketch.py", "directions", "drawn[:, : len(rows)] = rows.T", "pass", "test_sums"),
    ("aggregate/best_rank/sketch.py", "ranged", "pair.scaling * pair.B", "pair.B", "test_sums"),
    ("aggregate/best_rank/sketch.py", "projected", "pair.scaling * narrow", "narrow", "test_sums"),
    ("aggregate/best_rank/sketch.py", "whole", "Z.double() / scaling", "Z.double()", "test_sums"),
    ("strategy/two_trips.py", "near_A", "{name} {round_}", "{name}", "test_sums"),
    ("strategy/two_trips.py", "two_trips", "question.get(WARM + name, received.modules[name].A)", "received.modules[name].A", "test_sums"),
    ("federation/trips.py", "gather_sums", "if b.client not in refused", "if True", "test_sums"),
    ("federation/trips.py", "_mean", "weighed.weights[update.client] * tensor", "tensor", "test_sums"),
    ("federation/gate.py", "beyond", "moved[kind] > factor * median", "False", "test_sums"),
    ("secure/member.py", "shared", "if not verify(name, public.statement(member.terms, name), public.signature):", "if False:", "test_secure"),
    ("secure/member.py", "shared", "roster.get(member.name) != member.public", "False", "test_secure"),
    ("secure/member.py", "shared", "len(set(every)) != len(every)", "False", "test_secure"),
    ("secure/member.py", "masked", "if trip in member.sent:", "if False:", "test_secure"),
    ("secure/member.py", "signed_mask", "numbers if name < other else (np.uint32(0) - numbers)", "numbers", "test_secure"),
    ("secure/member.py", "agreed_on", "trip in member.signed and member.signed[trip] != names", "False", "test_secure"),
    ("secure/member.py", "revealed", "len(agreeing) < least", "False", "test_secure"),
    ("secure/member.py", "revealed", "0 if o in names else 1", "0", "test_secure"),
    ("secure/member.py", "_list", "len(found) < member.terms.minimum", "False", "test_secure"),
    ("secure/member.py", "_list", "or member.name not in found", "", "test_secure"),
    ("secure/opening.py", "opened", "if keys.public_of(private) != roster[name].masking[trip]:", "if False:", "test_secure"),
    ("secure/opening.py", "opened", "total - numbers if other < name else total + numbers", "total - numbers", "test_secure"),
    ("secure/session.py", "Public.statement", "[terms.digest(), name, keys]", "[name, keys]", "test_secure"),
    ("secure/fixed_point.py", "encoded", "if not beyond <= bound * (1 + 1e-9):", "if False:", "test_secure"),
    ("secure/fixed_point.py", "encoded", "own = min(rows, grid.most)", "own = rows", "test_secure"),
    ("secure/fixed_point.py", "Grid.step", "- 1 - self.clients / 2", "", "test_secure"),
    ("secure/neighbours.py", "threshold", "2 * holders / 3", "holders / 3", "test_secure"),
    ("federation/sealed_client.py", "SealedClient._masked", "when_in(memory) != (terms.round, terms.attempt)", "False", "test_sealed"),
    ("federation/sealed_client.py", "SealedClient._keys", "or terms.minimum < own.minimum", "", "test_sealed"),
    ("federation/sealed_question.py", "Question", "like[name].double() + value", "value", "test_sealed"),
    ("aggregate/best_rank/sketch.py", "range_bound", "(moved_A.double() @ omega.abs())", "0 * (moved_A.double() @ omega.abs())", "test_sealed"),
    ("federation/loop.py", "_error", "replace(part, residual=aimed[0].residual)", "part", "test_sums"),
    ("aggregate/best_rank/power.py", "product", "c * pair.scaling for", "c for", "test_power"),
    ("aggregate/best_rank/power.py", "Product.under", "(self.weights[:, None] * (self.left.T @ U)).T", "(self.left.T @ U).T", "test_power"),
    ("aggregate/best_rank/power.py", "find", "V = W.T @ (across / theta)", "V = W.T @ across", "test_power"),
    ("aggregate/best_rank/power.py", "find", ")) ** 2 + float(gained)", ")) ** 2", "test_power"),
    ("aggregate/best_rank/power.py", "_factor", "return q / (1 - q)", "return q * (1 - q)", "test_power"),
    ("aggregate/best_rank/power.py", "find", "growths[-1] * _factor", "0.0 * _factor", "test_power"),
    ("aggregate/best_rank/power.py", "find", "(theta[rank:].square()", "(theta[rank - 1:].square()", "test_power"),
    ("aggregate/best_rank/power.py", "_filled", "if count <= 0:", "if True:", "test_power"),
    ("aggregate/best_rank/power.py", "jittered", "1 + JITTER * (2 * move - 1)", "1", "test_power"),
    ("aggregate/best_rank/project.py", "cheapest", "if passes > 8:", "if passes < 4:", "test_power"),
    ("aggregate/best_rank/project.py", "iterated", "validate.is_finite(first) and", "True or", "test_contract"),
    ("aggregate/flora_na/matrix_free.py", "in_p", "wanted - B @ S", "wanted", "test_mix"),
    ("aggregate/flora_na/matrix_free.py", "in_q", "wanted - S @ A", "wanted - A", "test_mix"),
    ("aggregate/flora_na/matrix_free.py", "in_p", "move @ S)", "move)", "test_mix"),
    ("aggregate/flora_na/matrix_free.py", "step", "residual - length * bent", "residual", "test_mix"),
    ("aggregate/flora_na/matrix_free.py", "in_q", "+ B.T @ module.D_0", "", "test_mix"),
    ("aggregate/flora_na/matrix_free.py", "target_times", "product = module.D_0 @", "product = 0 * module.D_0 @", "test_mix"),
    ("aggregate/flora_na/matrix_free.py", "square_estimate", "** 2 / PROBES", "** 2", "test_mix"),
    ("aggregate/flora_na/gram.py", "quadratic", "ivab,...vba->...i", "ivab,...vab->...i", "test_mix"),
    ("aggregate/flora_na/gram.py", "quadratic", "G[:, :1] + G[:, 1:]", "G[:, 1:]", "test_mix"),
    ("aggregate/flora_na/gram.py", "quadratic", "half[..., :1, :, :] + half[..., 1:, :, :]", "half[..., 1:, :, :]", "test_mix"),
    ("aggregate/flora_na/gram.py", "whole_blocks", "G[0, 0] + G[:1, 1:]", "G[0, 0] - G[:1, 1:]", "test_mix"),
    ("aggregate/flora_na/als.py", "_half_step", "hermitian=True) @ residual", "hermitian=True) @ -residual", "test_mix"),
    ("aggregate/flora_na/als.py", "_lowest", "errors[best] < errors[0] * (1 - margin) - floor", "False", "test_starts"),
    ("aggregate/flora_na/als.py", "_expected", "return float(\"inf\")\n    before", "return 0.0\n    before", "test_starts"),
    ("aggregate/flora_na/starts.py", "_chosen", "towards.square() / own", "0.0 * own", "test_starts"),
    ("aggregate/flora_na/matrix_free.py", "rescaled", "if left == right == 0:", "if True:", "test_starts"),
    ("aggregate/flora_na/component.py", "_half_step", "gather(1, component[:, None])", "gather(1, 0 * component[:, None])", "test_component"),
    ("aggregate/flora_na/component.py", "solve", "if not target + square < history[-1] - floor:", "if False:", "test_component"),
    ("aggregate/flora_na/component.py", "_half_step", "S[component][:, component]", "S[0, 0]", "test_component"),
    ("aggregate/flora_na/component.py", "solve", "start = als.solve(blocks)", "start = als.solve(blocks, sweeps=0)", "test_component"),
    ("aggregate/flora_na/als.py", "solve", "p, q = p * ratio, q / ratio", "p, q = p * ratio, q * ratio", "test_mix"),
    ("aggregate/flora_na/adamw.py", "solve", "if value < best:", "if True:", "test_mix"),
    ("aggregate/flora_na/scalars.py", "directions_of", "D, F = D - D_0, F - F_0", "D, F = D, F - F_0", "test_mix"),
    ("aggregate/flora_na/scalars.py", "directions_of", "D_u *= pair.scaling / scaling", "D_u *= scaling / pair.scaling", "test_mix"),
    ("aggregate/flora_na/scalars.py", "per_model_relative", "unit=1.0 / squares[name]", "unit=squares[name]", "test_mix"),
    ("aggregate/error.py", "_joined", "one.B.double() * one.scaling", "one.B.double()", "test_exact"),
    ("aggregate/error.py", "measure", "pair.rank)", "pair.rank + 1)", "test_linalg"),
    ("aggregate/error.py", "measure", "(weight, piece) for", "(1.0, piece) for", "test_linalg"),
    ("train/stacked.py", "StackedPair.__call__", "self.scaling * (inner", "1.0 * (inner", "test_cohort"),
    ("train/stacked.py", "StackedPair._scaled", "2 * s * cross", "s * cross", "test_cohort"),
    ("train/stacked.py", "StackedPair._scaled", "(c - 1)[:, None]", "c[:, None]", "test_cohort"),
    ("train/stacked.py", "StackedPair._scaled", "straight - base.bias", "straight", "test_cohort"),
    ("train/stacked.py", "StackedCore.__call__", "cnhk,chjk,ch->cnhj", "cnhk,chkj,ch->cnhj", "test_cohort"),
    ("train/cohort.py", "clip_each", "clamp(max=1.0)", "clamp(max=9.0)", "test_cohort"),
    ("train/cohort.py", "loss_each", "logits[:, :-1], labels[:, 1:]", "logits[:, 1:], labels[:, 1:]", "test_cohort"),
    ("train/client.py", "pieces", "count / sum(counts)", "1 / len(counts)", "test_local_training"),
    ("train/cohort.py", "train_together", "rate * factor(step)", "rate", "test_cohort"),
    ("train/own_streams.py", "OwnStreams._from", "self._default.set_state(own.get_state())", "pass", "test_cohort"),
    ("federation/spool.py", "Spool.kept", 'facts["asked"] == self._digest(brief)', "True", "test_spool"),
    ("federation/spool.py", "Spool.kept", 'told["sha256"] == _digest_of(facts)', "True", "test_spool"),
    ("lora/linalg.py", "stack", "(c * pair.scaling)", "c", "test_linalg"),
    ("lora/linalg.py", "balanced", "(part.values / scaling).sqrt()", "part.values / scaling", "test_linalg"),
    ("lora/linalg.py", "between", "whole.left[:, begin:end]", "whole.left[:, : end - begin]", "test_linalg"),
    ("strategy/oracle.py", "_step", "whole.adapter, whole.residual)", "whole.adapter)", "test_strategy"),
    ("strategy/flora_na.py", "", "lambda state: state.adapter", "lambda state: None", "test_strategy"),
    ("aggregate/best_rank/exact.py", "_stacked", "mul_(coefficient * pair.scaling)", "mul_(coefficient)", "test_exact"),
    ("aggregate/best_rank/exact.py", "_folded", "product.addmm_(part.left", "product.copy_(part.left", "test_exact"),
    ("aggregate/best_rank/exact.py", "_folded", "product.addmm_(part.left, part.right)", "product.sub_(part.left @ part.right)", "test_exact"),
    ("aggregate/best_rank/exact.py", "_by_gram", "root / (squares * scaling)", "root / squares", "test_exact"),
    ("aggregate/best_rank/exact.py", "_by_gram", "least = grams.whole - float(squares.sum())", "least = grams.whole - float(squares[0])", "test_exact"),
    ("aggregate/best_rank/exact.py", "_by_gram", "if grams.coarse > _shows(least, grams.whole) or", "if", "test_exact"),
    ("aggregate/best_rank/exact.py", "_by_gram", "if provable else", "if True else", "test_exact"),
    ("aggregate/best_rank/exact.py", "_missed", "missed = grams.whole - 2 * cross", "missed = grams.whole - cross", "test_exact"),
    ("aggregate/best_rank/exact.py", "_missed", "E, F = X - B, Y - A", "E, F = X - B, Y - Y", "test_exact"),
    ("aggregate/best_rank/exact.py", "_Grams.squares", "(V * values.clamp_min(0.0).sqrt())", "V", "test_exact"),
    ("aggregate/best_rank/exact.py", "_root", "lower = vectors * values", "lower = vectors.T * values", "test_exact"),
    ("aggregate/best_rank/exact.py", "judged", "float(squares[rank:].clamp_min(0.0).sum())", "0.0", "test_exact"),
    ("aggregate/best_rank/exact.py", "judged", "whole, least = float(squares.sum()), float(squares[rank:].sum())", "least = float(squares[rank:].sum())", "test_exact"),
    ("aggregate/best_rank/exact.py", "_Grams.values", "else K @ self.H @ K.T", "else self.H @ self.G", "test_exact"),
    ("aggregate/best_rank/exact.py", "_Grams.values", "core = self.G\n", "core = self.H\n", "test_exact"),
    ("aggregate/signed.py", "whole_tensor", "(tensor, alpha=weight)", "(tensor)", "test_merge"),
    ("aggregate/signed.py", "_turned", "B=-pair.B", "B=pair.B", "test_merge_defined"),
    ("aggregate/signed.py", "weighted_sum", "scaling=size * pair.scaling", "scaling=pair.scaling", "test_merge_defined"),
    ("aggregate/signed.py", "whole_tensor", "if abs(total - 1.0) > ONE:", "if False:", "test_merge_defined"),
    ("federation/quantize.py", "quantized", ".round().clamp", ".trunc().clamp", "test_wire"),
    ("federation/quantize.py", "quantized", "abs().amax(dim=1) / LEVELS", "abs().amax(dim=1) / 128", "test_wire"),
    ("federation/quantize.py", "quantized", "rows.abs().amax", "rows.amax", "test_wire"),
    ("federation/quantize.py", "quantized", "scale[:, None] > 0, rows", "scale[:, None] > 1e-9, rows", "test_wire"),
    ("federation/quantize.py", "written", "t.double() - received[name].double() for", "t.double() for", "test_wire"),
    ("federation/quantize.py", "read", "(received[name].double() + c)", "c", "test_wire"),
    ("federation/quantize.py", "_form_of_int8", "-(-t.numel() // BLOCK)", "t.numel() // BLOCK", "test_wire"),
    ("federation/error_feedback.py", "outgoing", "+ left[n][_blocks(n, brief)].double() if", "if", "test_wire"),
    ("federation/error_feedback.py", "outgoing", "wanted[name] - there[name].double()", "up[name] - there[name].double()", "test_wire"),
    ("federation/error_feedback.py", "outgoing", ".nan_to_num(0.0, 0.0, 0.0)", "", "test_wire"),
    ("federation/error_feedback.py", "outgoing", "if name.startswith(FEEDBACK)}", "if False}", "test_wire"),
    ("federation/error_feedback.py", "_difference", "* second.scaling, torch", ", torch", "test_wire"),
    ("federation/error_feedback.py", "_difference", "[A1, A1 - A]", "[A1, A - A1]", "test_wire"),
    ("federation/error_feedback.py", "_blocks", "sorted(brief.blocks) if", "list(brief.blocks) if", "test_wire"),
    ("strategy/best_rank.py", "", "    coordinates=\"move\",\n", "", "test_uplink"),
    ("federation/weighting.py", "by_examples", "update.examples / total for", "1 / len(updates) for", "test_loop"),
    ("train/hooks.py", "Residual.__call__", "self.scaling * F.linear", "F.linear", TRAIN),
    ("robust/changes.py", "_difference", "= new.double() - old[corner].double()", "= new.double()", ROBUST),
    ("robust/changes.py", "_from_one_start", "+ aA_u + Aa_v + aa)", "+ aA_u + Aa_v)", ROBUST),
    ("robust/changes.py", "_from_one_start", "+ Bb_v * aA_u)", ")", ROBUST),
    ("robust/changes.py", "_from_one_start", "slice(u * rank, None)", "slice(0, None)", ROBUST),
    ("robust/changes.py", "_from_one_start", "result.triu(1).T", "result.T", ROBUST),
    ("robust/changes.py", "_from_one_start", "* scaling.outer(scaling)", "* scaling", ROBUST),
    ("robust/changes.py", "_started_alike", "== old.B.shape", "is not None", ROBUST),
    ("robust/changes.py", "_started_alike", "torch.equal(before.modules[module].A, old.A)", "True", ROBUST),
    ("robust/changes.py", "change", "right = [*left, old.B.double() * new.scaling], [*right, dA]", "right = left, right", ROBUST),
    ("robust/changes.py", "distance_gram", "total += gram / unit", "total += gram", ROBUST),
    ("robust/shrink.py", "_line", "top = min(1.0, first) if", "top = 1.0 if", ROBUST),
    ("robust/shrink.py", "drawn_back", "min(linear, _line(", "min(1.0, _line(", ROBUST),
    ("robust/verdict.py", "smallest", "value <= last * (1 + 1e-9)", "value < last", ROBUST),
    ("robust/clip.py", "shares", "statistics.median_low", "max", ROBUST),
    ("robust/multi_krum.py", "scores", ": len(gram) - hostile - 2]", ":]", ROBUST),
    ("robust/geometric_median.py", "to_mean", "- 0.5 * (beta @ towards)", "- 0.4 * (beta @ towards)", ROBUST),
    ("robust/geometric_median.py", "geometric_median", "after = own / to_mean", "after = 1 / to_mean", ROBUST),
    ("robust/trimmed.py", "trimmed.weigh", "count - hostile), weights)", "count), weights)", ROBUST),
    ("robust/cap.py", "capped", "        full |= over", "        full = over", ROBUST),
    ("federation/weighting.py", "weigh", "drawn_back(pair, share)", "pair[0]", ROBUST),
    ("federation/weighting.py", "weigh", "usually(len(updates)) if how.most is None", "1.0 if how.most is None", ROBUST),
    ("federation/step_bounds.py", "_largest_step", "(1 - first**t)) ** 2", "(1 - first**t))", ROBUST),
    ("federation/step_bounds.py", "Reach.of", "own = (1 + scale) * own", "own = own", ROBUST),
]
# fmt: on


def paths(tests: str) -> list[str]:
    """The files of the named tests, first those that are likely to notice."""
    return [f"tests/{name}.py" for name in tests.split()]


def mutated(text: str, symbol: str, old: str, new: str) -> str | None:
    """The source with the text exchanged inside one function or class; None where it does not stand there."""
    begin, end = 0, len(text)
    if symbol:
        node: ast.AST = ast.parse(text)
        for name in symbol.split("."):
            inner = [n for n in ast.walk(node) if isinstance(n, ast.FunctionDef | ast.ClassDef) and n.name == name]
            if not inner:
                return None
            node = inner[0]
        lines = text.splitlines(keepends=True)
        first = min([node.lineno, *(d.lineno for d in node.decorator_list)])
        begin, end = sum(map(len, lines[: first - 1])), sum(map(len, lines[: node.end_lineno]))
    at = text.find(old, begin, end)
    return None if at < 0 else text[:at] + new + text[at + len(old) :]


def survives(file: str, symbol: str, old: str, new: str, tests: str) -> bool | None:
    """Whether the tests pass with the mutation; None where its text is no longer in the function."""
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "src"
        shutil.copytree(ROOT / "src", source, ignore=shutil.ignore_patterns("__pycache__"))
        path = source / "florana" / file
        changed = mutated(path.read_text(), symbol, old, new)
        if changed is None:
            return None
        path.write_text(changed)
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
    for file, symbol, old, new, tests in chosen:
        verdict = survives(file, symbol, old, new, tests)
        words = {None: "NOT FOUND", True: "SURVIVED", False: "killed"}[verdict]
        holes += verdict is not False
        print(f"{words:9}  {file} {symbol}: {old}  ->  {new}  ({tests})", flush=True)
    print(f"{len(chosen) - holes} of {len(chosen)} mutations killed")
    sys.exit(1 if holes else 0)


if __name__ == "__main__":
    main()
