"""Rounds of secure sums: the same model as without them, to the fixed point; clients that leave; what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from florana.errors import FederationError, FloranaError, RecipeError
from florana.federation.entrywise import entrywise
from florana.federation.event import Event
from florana.federation.hidden_part import Hiding
from florana.federation.local_engine import LocalEngine
from florana.federation.messages import Failure, Step, pack_question
from florana.federation.sealed_client import SealedClient, in_memory
from florana.federation.sealed_question import Question
from florana.federation.sealed_sums import gather_sealed
from florana.federation.terms import Sealing
from florana.federation.trip_memory import update_of
from florana.lora.factors import Contribution
from florana.recipe.load import check
from florana.recipe.schema import Recipe
from florana.runs import setup as runs_setup
from florana.runs.prepared import prepare
from florana.runs.rounds import Result
from florana.runs.setup import execute
from florana.secure import wire
from florana.secure.identities import made_up
from florana.secure.session import Terms
from florana.secure.session_keys import Refused
from florana.strategy import STRATEGIES
from tests.federation import built, first_adapter
from tests.federation import federation as federation_of
from tests.method_cases import start_of, trained

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")

SUMS_ONLY = sorted(name for name in STRATEGIES if built(name).facts.secure_aggregation.startswith("yes"))
OPTIONS: dict[str, Mapping[str, Any]] = {"ravan": {"heads": 2, "size": 4}}


def sealed(table: dict[str, Any], more: Mapping[str, Any] | None = None, open_: bool = False) -> Recipe:
    """The table's recipe with secure sums; `open_`: the same without them, all else alike."""
    merged = {**table, "evaluate": {**table.get("evaluate", {}), "personal": "never"}}
    merged["federation"] = {**table.get("federation", {}), "rounds": 2}
    for section, keys in (more or {}).items():
        merged[section] = dict(keys) if section == "strategy" else {**merged.get(section, {}), **keys}
    by_rows = merged["federation"].get("weighting", "examples") == "examples"
    if not open_:
        rows = {"max_rows": 1000} if by_rows else {}
        merged["privacy"] = {"secure_aggregation": True, "bits": 32, **rows, **merged.get("privacy", {})}
    else:
        merged.pop("privacy", None)
        merged["federation"]["max_weight"] = 1.0  # the server could not cap what it does not see
    return check(merged, "x")


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter" / "adapter_model.safetensors")


def far(one: Mapping[str, torch.Tensor], other: Mapping[str, torch.Tensor]) -> float:
    """The largest relative distance of two tensors of the same name; products where factors may turn."""
    assert one.keys() == other.keys()
    return max(float((one[n] - other[n]).norm() / other[n].norm().clamp_min(1e-6)) for n in one)


def product_far(one: Mapping[str, torch.Tensor], other: Mapping[str, torch.Tensor]) -> float:
    names = [n.removesuffix("lora_A.weight") for n in one if n.endswith("lora_A.weight")]
    worst = 0.0
    for name in names:
        first, second = (t[name + "lora_B.weight"].double() @ t[name + "lora_A.weight"].double() for t in (one, other))
        worst = max(worst, float((first - second).norm() / second.norm().clamp_min(1e-9)))
    return worst


@pytest.mark.parametrize("name", [n for n in SUMS_ONLY if n != "fedask"])
def test_a_step_on_the_one_mean_is_the_step_on_all(name: str) -> None:
    """Of every method that says it needs sums alone; over rounds, since some take turns."""
    strategy = built(name)
    state = strategy.init(start_of())
    for seed in range(3):
        parts = trained(strategy, state, seed)
        sent = strategy.brief(state, "c0")
        sums = entrywise(sent.work.up)
        total = sum(part.weight for part in parts)
        mean: dict[str, torch.Tensor] = {}
        for part in parts:
            for tensor_name, tensor in sums.measure(0, 1, {}, sent.adapter, part.adapter).items():
                term = part.weight / total * tensor.double()
                mean[tensor_name] = term if tensor_name not in mean else mean[tensor_name] + term
        like = sent.adapter.tensors()
        adapter = sums.mean(sent.adapter, [{n: t.to(like[n].dtype) for n, t in mean.items()}])
        alone = strategy.step(state, [Contribution("mean", adapter, 1.0, parts[0].residual)]).state
        state = strategy.step(state, parts).state
        for tensor_name, tensor in state.adapter.tensors().items():
            assert torch.allclose(alone.adapter.tensors()[tensor_name], tensor, atol=2e-5, rtol=1e-4), (
                name,
                tensor_name,
            )


@pytest.mark.parametrize("name", SUMS_ONLY)
def test_every_method_of_sums_gives_the_open_runs_model(
    name: str, recipe_table: dict[str, Any], tmp_path: Path
) -> None:
    more = {"strategy": {"name": name, **OPTIONS.get(name, {})}}
    hidden = execute(sealed(recipe_table, more), tmp_path / "hidden")
    plain = execute(sealed(recipe_table, more, open_=True), tmp_path / "plain")
    measure_ = product_far if name in ("fedask", "fedsvd") else far
    assert measure_(weights(tmp_path / "hidden"), weights(tmp_path / "plain")) < 2e-3
    for one, other in zip(hidden.records, plain.records, strict=True):
        assert one.train_loss == pytest.approx(other.train_loss, rel=1e-4)
        assert list(one.clients) == list(other.clients)
        assert one.weights == one.examples == {}
        assert one.notes["rows"] == sum(other.examples.values())
        if other.error["overall"] is not None:
            assert one.error["overall"] == pytest.approx(other.error["overall"], abs=2e-3)


SETTINGS: dict[str, Mapping[str, Any]] = {
    "as it is": {},
    "uniform": {"federation": {"weighting": "uniform"}},
    "momentum": {"server": {"optimizer": "momentum"}},
    "mixed ranks": {"model": {"rank": 4, "client_ranks": [1, 4, 2]}},
    "personal head": {"model": {"head": "personal"}},
    "some of the clients": {"federation": {"clients_per_round": 3}},
    "workers": {"engine": {"workers": 2}},
    "cohort": {"engine": {"cohort": 3}},
    "factors": {"strategy": {"name": "fedit"}, "server": {"optimizer": "adam"}},
    "epochs": {"train": {"steps": None, "epochs": 1}},
}


@pytest.mark.parametrize("setting", SETTINGS)
def test_best_rank_from_secure_sums_in_every_setting(
    setting: str, recipe_table: dict[str, Any], tmp_path: Path
) -> None:
    more = {"strategy": {"name": "best-rank", "source": "sums"}, **SETTINGS[setting]}
    if "train" in more:
        more["train"] = {k: v for k, v in {**recipe_table["train"], **more["train"]}.items() if v is not None}
        recipe_table = {**recipe_table, "train": {}}
    hidden = execute(sealed(recipe_table, more), tmp_path / "hidden")
    plain = execute(sealed(recipe_table, more, open_=True), tmp_path / "plain")
    assert product_far(weights(tmp_path / "hidden"), weights(tmp_path / "plain")) < 5e-3
    for one in hidden.records:
        assert one.error["overall"] <= 1.2 * one.error["optimum"] + 0.02
    assert len(plain.records) == 2


def test_twenty_bits_are_enough_and_cost_five_eighths(recipe_table: dict[str, Any], tmp_path: Path) -> None:
    """Beside float32: two and a half bytes a number, and the messages of the protocol."""
    table = {**recipe_table, "strategy": {"name": "fedit"}}
    few = execute(sealed(table, {"privacy": {"bits": 20}}), tmp_path / "few")
    plain = execute(sealed(table, open_=True), tmp_path / "plain")
    assert far(weights(tmp_path / "few"), weights(tmp_path / "plain")) < 2e-2
    assert 0.5 < few.records[0].bytes_up / plain.records[0].bytes_up < 1.6  # a tiny model: messages weigh


def test_a_resumed_run_ends_in_the_same_model(recipe_table: dict[str, Any], tmp_path: Path) -> None:
    """Masks are drawn anew, sums are whole numbers: the same bytes."""
    table = {**recipe_table, "strategy": {"name": "best-rank", "source": "sums"}}
    whole = sealed(table, {"federation": {"rounds": 3}})
    execute(whole, tmp_path / "whole")
    execute(whole, tmp_path / "cut", until=1)
    execute(whole, tmp_path / "cut", resume=True)
    one, other = weights(tmp_path / "whole"), weights(tmp_path / "cut")
    assert all(torch.equal(one[n], other[n]) for n in one)


Spoil = Callable[[str, Step], Step | Failure | None]
"""(client, what it is asked) -> what comes in the place of its answer; None: its answer."""


def disturbed(recipe: Recipe, out: Path, spoil: Spoil, show: Callable[[Event], None] = lambda event: None) -> Result:
    """The run, with some answers of clients spoilt."""
    engine_of = runs_setup.engine_of

    def made(*given: Any, **named: Any) -> LocalEngine:
        engine = engine_of(*given, **named)
        inner = engine.exchange

        def exchange(steps: Mapping[str, Step]) -> Any:
            for client, step in steps.items():
                instead = spoil(client, step)
                if instead is None:
                    yield from inner({client: step})
                else:
                    yield client, instead

        engine.exchange = exchange  # type: ignore[method-assign]
        return engine

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runs_setup, "engine_of", made)
        return execute(recipe, out, show=show)


def many(table: dict[str, Any], **privacy: Any) -> Recipe:
    merged = {
        **table,
        "partition": {**table["partition"], "clients": 6},
        "strategy": {"name": "best-rank", "source": "sums"},
    }
    return sealed(merged, {"federation": {"rounds": 1, "clients_per_round": 6}, "privacy": privacy})


@pytest.mark.parametrize("step", ["keys", "shares", "masked", "survivors", "reveal"])
@pytest.mark.parametrize("trip", [0, 1])
def test_clients_that_leave_cost_the_others_nothing(
    step: str, trip: int, recipe_table: dict[str, Any], tmp_path: Path
) -> None:
    if trip and step in ("keys", "shares"):
        trip = 0

    def spoil(client: str, asked: Step) -> Failure | None:
        gone = client in ("client-1", "client-4") and asked.head["step"] == step and asked.head.get("trip", 0) == trip
        return Failure(client, "killed") if gone else None

    result = disturbed(many(recipe_table), tmp_path / "run", spoil)
    (record,) = result.records
    assert set(record.refused) == {"client-1", "client-4"}
    assert all("killed" in why for why in record.refused.values())
    early = step in ("keys", "shares") or (step == "masked" and trip == 0)
    assert len(record.clients) == (4 if early else 6)
    assert record.notes["answered"][0] == len(record.clients)
    assert record.error["overall"] < 0.2


@pytest.mark.parametrize("step", ["keys", "shares", "masked", "survivors", "reveal"])
def test_too_many_that_leave_end_the_round_without_a_sum(
    step: str, recipe_table: dict[str, Any], tmp_path: Path
) -> None:
    def spoil(client: str, asked: Step) -> Failure | None:
        return Failure(client, "killed") if client < "client-4" and asked.head["step"] == step else None

    with pytest.raises(FederationError) as caught:
        disturbed(many(recipe_table), tmp_path / "run", spoil)
    assert "killed" in str(caught.value) or "needed" in str(caught.value)
    assert "--resume" in str(caught.value)
    assert not (tmp_path / "run" / "rounds.jsonl").exists() or not (tmp_path / "run" / "rounds.jsonl").read_text()


DAMAGED: dict[str, tuple[str, Callable[[str], Step], str]] = {
    "keys that are none": ("keys", lambda client: Step({"keys": {"sealing": "zz"}}), "damaged"),
    "no keys": ("keys", lambda client: Step({}), "no keys"),
    "shares that are none": ("shares", lambda client: Step({"sealed": [1]}), "no table"),
    "a short vector": ("masked", lambda client: Step({}, b"short"), "5 bytes, not the"),
    "no signature": ("survivors", lambda client: Step({"signature": 3}), "damaged"),
    "shares that are no words": ("reveal", lambda client: Step({"shares": {"a": 1}}), "damaged"),
}


@pytest.mark.parametrize("fault", DAMAGED)
def test_a_damaged_answer_is_its_senders_alone(fault: str, recipe_table: dict[str, Any], tmp_path: Path) -> None:
    step, answer, reason = DAMAGED[fault]

    def spoil(client: str, asked: Step) -> Step | None:
        return answer(client) if client == "client-2" and asked.head["step"] == step else None

    (record,) = disturbed(many(recipe_table), tmp_path / "run", spoil).records
    assert reason in record.refused["client-2"]
    assert set(record.refused) == {"client-2"}


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"strategy": {"name": "flora-na"}}, "strategy.source = 'sums'"),
        ({"strategy": {"name": "best-rank"}}, "set strategy.source = 'sums'"),
        ({"strategy": {"name": "hetlora"}}, "one of fedit"),
        ({"robust": {"rule": "clip"}, "strategy": {"name": "fedit"}}, "rules compare single clients' updates"),
        ({"federation": {"uplink": "int8"}}, "privacy.bits says"),
        ({"federation": {"max_weight": 0.5}}, "the server sees no weights"),
        ({"evaluate": {"personal": "last"}}, "set it to 'never'"),
        ({"server": {"optimizer": "extrapolate"}}, "apart"),
        ({"train": {"optimizer": "adafactor"}}, "a bound on how far"),
        ({"train": {"optimizer": "sgd", "weight_decay": 0.1}}, "a bound on how far"),
        ({"privacy": {"min_clients": 1}}, "min_clients"),
        ({"privacy": {"min_clients": 9}}, "privacy.min_clients is 9, but 3 clients are asked"),
        ({"privacy": {"bits": 12}}, "bits"),
        ({"privacy": {"max_rows": 0}}, "max_rows"),
        ({"federation": {"weighting": "uniform"}, "privacy": {"max_rows": 5}}, "no meaning with federation.weighting"),
    ],
    ids=str,
)
def test_what_does_not_go_with_secure_sums_is_said(
    more: Mapping[str, Any], message: str, recipe_table: dict[str, Any]
) -> None:
    table = {**recipe_table, "strategy": {"name": "fedit"}}
    with pytest.raises(RecipeError) as caught:
        sealed(table, more)
    assert message in str(caught.value)


def test_rows_need_a_bound_and_settings_a_purpose(recipe_table: dict[str, Any]) -> None:
    table = {**recipe_table, "evaluate": {"personal": "never"}, "strategy": {"name": "fedit"}}
    with pytest.raises(RecipeError, match="max_rows is missing"):
        check({**table, "privacy": {"secure_aggregation": True}}, "x")
    with pytest.raises(RecipeError, match="no meaning without"):
        check({**table, "privacy": {"max_rows": 3}}, "x")


# what a client refuses of its own


def one_client(spent: Any = None, **own: Any) -> SealedClient:
    sealing = Sealing(**{"bits": 20, "most": 100, "minimum": 3, **own})
    return SealedClient(made_up(["a", "b", "c"])["a"], sealing, None, 5, spent or in_memory())


def asked_for(**said: Any) -> Step:
    facts = {
        "session": "s",
        "run": "r",
        "round": 4,
        "attempt": 0,
        "trips": (0,),
        "bits": 20,
        "most": 100,
        "minimum": 3,
        **said,
    }
    return Step({"step": "keys", "terms": wire.terms_to(Terms(**facts))})


NOTHING: Callable[[str, int], dict[str, torch.Tensor]] = lambda run, round_: {}  # noqa: E731


def shared_by(clients: Mapping[str, SealedClient], **said: Any) -> dict[str, dict[str, str]]:
    """Owner -> holder -> what is sealed for it, after the first two steps."""
    keys = {n: c.answer(asked_for(**said), NOTHING).head["keys"] for n, c in clients.items()}
    step = Step({"step": "shares", "session": "s", "roster": keys})
    return {n: c.answer(step, NOTHING).head["sealed"] for n, c in clients.items()}


@pytest.mark.parametrize(
    ("said", "message"),
    [
        ({"minimum": 2}, "sums over 2"),
        ({"bits": 32}, "asks for 32 bits"),
        ({"most": 1}, "1 rows at most"),
        ({"trips": (0, 1)}, "does not know"),
    ],
)
def test_terms_below_the_clients_own_recipe_are_refused(said: Mapping[str, Any], message: str) -> None:
    with pytest.raises(Refused) as caught:
        one_client().answer(asked_for(**said), NOTHING)
    assert message in str(caught.value)
    assert one_client().answer(asked_for(minimum=4), NOTHING).head["keys"]


def test_a_step_of_no_session_or_of_none_that_is_known_is_refused() -> None:
    client = one_client()
    with pytest.raises(Refused, match="knows nothing of this session"):
        client.answer(Step({"step": "shares", "session": "s", "roster": {}}), NOTHING)
    client.answer(asked_for(), NOTHING)
    with pytest.raises(Refused, match="knows nothing of this session"):
        client.answer(Step({"step": "shares", "session": "other", "roster": {}}), NOTHING)
    for head in ({"step": "open", "session": "s", "trip": 0}, {"session": "s", "trip": 0}):
        with pytest.raises(Refused, match="a step that it does not know"):
            client.answer(Step(head), NOTHING)


def test_an_update_is_summed_up_once_whatever_a_server_calls_it() -> None:
    """Another session of a round that was opened is told so; an update of a round under another number is none."""
    spent = in_memory()
    spent("r", (4, 0, 0), "before")
    assert one_client(spent).answer(asked_for(), NOTHING).head == {"spent": True}
    assert one_client(spent).answer(asked_for(attempt=1), NOTHING).head["keys"]
    assert one_client(spent).answer(asked_for(round=5), NOTHING).head["keys"]
    who = made_up(["a", "b", "c"])
    clients = {n: SealedClient(who[n], Sealing(20, 100, 3), None, 5, in_memory()) for n in who}
    first = first_adapter()
    memory = update_of(first, first, 0.5, (4, 0))  # the update of round 4
    shared = shared_by(clients, round=5)
    head = {
        "step": "masked",
        "session": "s",
        "trip": 0,
        "present": sorted(clients),
        "sealed": {o: parts["a"] for o, parts in shared.items() if o != "a"},
    }
    with pytest.raises(FloranaError, match="keeps no update of round 5"):
        clients["a"].answer(Step(head), lambda run, round_: memory)


def test_what_a_server_asks_after_the_keys_is_looked_at_again() -> None:
    """The update is gone; a part that noise would not cover; another program of the site opened the update since."""
    who, first = made_up(["a", "b", "c"]), first_adapter()
    whole = update_of(first, first, 0.5, (4, 0))
    spent = in_memory()
    hiding = Hiding(1.0, 1.0, lambda *which: np.random.default_rng(0), lambda parts: None, lambda: 0.0)

    def begun() -> tuple[dict[str, SealedClient], Callable[..., Step]]:
        """The clients after the second step, and what asks one of them for its vector."""
        clients = {
            n: SealedClient(who[n], Sealing(20, 100, 3), None, 5, spent if n == "a" else in_memory()) for n in who
        }
        shared = shared_by(clients)
        head = {"step": "masked", "session": "s", "trip": 0, "present": sorted(clients), "returns": ["A", "B"]}
        head |= {"scalings": first.scalings, "bounds": dict.fromkeys([*first.tensors(), "loss"], 100.0)}

        def ask(name: str = "a", memory: Mapping[str, torch.Tensor] = whole, **more: Any) -> Step:
            own = {o: parts[name] for o, parts in shared.items() if o != name}
            return clients[name].answer(Step({**head, "sealed": own, **more}, pack_question({})), lambda *which: memory)

        return clients, ask

    _, ask = begun()
    with pytest.raises(FloranaError, match="keeps no update of round 4"):
        ask(memory={name: tensor for name, tensor in whole.items() if not name.startswith("received/")})
    clients, ask = begun()
    clients["a"].hiding = hiding
    with pytest.raises(Refused, match="a part that is no change"):
        ask(absolute=True)
    clients, ask = begun()
    signed = {}
    for name, client in clients.items():
        assert ask(name).payload
        left = Step({"step": "survivors", "session": "s", "trip": 0, "names": sorted(clients)})
        signed[name] = client.answer(left, NOTHING).head["signature"]
    reveal = Step({"step": "reveal", "session": "s", "trip": 0, "signatures": signed})
    assert clients["b"].answer(reveal, NOTHING).head["shares"]
    spent("r", (4, 0, 0), "another")
    with pytest.raises(Refused, match="summed up in another session"):
        clients["a"].answer(reveal, NOTHING)


def test_a_method_of_some_heads_or_an_unknown_reach_has_no_secure_sums() -> None:
    """Recipes say so first; what is put together by hand is told here."""
    sealing, fixed = Sealing(20, 100, 3), federation_of(1)
    some, plain = built("ravan one head"), built("fedit")
    begin = some.init(first_adapter())
    with pytest.raises(RecipeError, match="some heads per client does not go with secure sums"):
        gather_sealed(some, sealing, begin, fixed.clients, None, fixed, lambda event: None)  # type: ignore[arg-type]
    state = plain.init(first_adapter())
    payloads = {client: plain.brief(state, client) for client in fixed.clients}
    sums = entrywise(payloads[fixed.clients[0]].work.up)
    with pytest.raises(RecipeError, match="how far training can move a number"):
        Question(sums, 0, payloads, state, [], fixed, sealing)


def test_a_bound_of_other_tensors_is_refused_and_a_large_change_never_sent(recipe_table: dict[str, Any]) -> None:
    who = made_up(["a", "b", "c"])
    clients = {n: SealedClient(who[n], Sealing(20, 100, 3), None, 5, in_memory()) for n in who}
    first = first_adapter()
    moved = first.tensors() | {"A/layer.0.q": first.modules["layer.0.q"].A + 3.0}
    from florana.lora.factors import adapter_from_tensors

    memory = update_of(first, adapter_from_tensors(moved, first.scalings), 0.5, (4, 0))
    shared = shared_by(clients)
    names = [*first.tensors(), "loss"]
    head = {
        "step": "masked",
        "session": "s",
        "trip": 0,
        "present": sorted(clients),
        "sealed": {o: parts["a"] for o, parts in shared.items() if o != "a"},
        "scalings": first.scalings,
        "returns": ["A", "B"],
        "absolute": False,
    }

    def ask(bounds: Mapping[str, float]) -> Step:
        step = Step({**head, "bounds": dict(bounds)}, pack_question({}))
        return clients["a"].answer(step, lambda run, round_: memory)

    with pytest.raises(Refused, match="of other tensors"):
        ask({"A/layer.0.q": 1.0})
    with pytest.raises(FloranaError, match="was changed by 3, more than the 1 "):
        ask(dict.fromkeys(names, 1.0))
    answer = ask(dict.fromkeys(names, 100.0))
    assert answer.payload
    with pytest.raises(Refused, match="second time"):
        ask(dict.fromkeys(names, 100.0))


def test_the_prepared_setup_and_the_report_say_what_the_server_saw(
    recipe_table: dict[str, Any], tmp_path: Path
) -> None:
    from florana.report.page import write_report

    recipe = sealed({**recipe_table, "strategy": {"name": "fedit"}})
    execute(recipe, tmp_path / "run", setup=prepare(recipe))
    page = write_report([tmp_path / "run"], tmp_path / "report.html").read_text()
    assert "sums over 3 clients or more, 32 bits a number" in page
    assert "The server saw sums over clients alone" in page
    assert "updates were visible" not in page
    setup = json.loads((tmp_path / "run" / "setup.json").read_text())
    assert "Who holds what" in page
    for holds in setup["clients"].values():  # between sites nobody says it
        holds.pop("train")
    (tmp_path / "run" / "setup.json").write_text(json.dumps(setup))
    again = write_report([tmp_path / "run"], tmp_path / "again.html").read_text()
    assert "Who holds what" not in again
    card = (tmp_path / "run" / "adapter" / "README.md").read_text()
    assert "hidden numbers of training rows" in card
    assert np.isfinite(float(execute(recipe, tmp_path / "again").records[-1].train_loss or 0))


def test_a_server_that_ended_as_a_sum_was_opened_goes_on(recipe_table: dict[str, Any], tmp_path: Path) -> None:
    """The clients remember what they opened: the round is trained anew, with other updates, and the run goes on."""
    recipe, told = many(recipe_table), list[str]()
    before = in_memory()
    before("here", (1, 0, 0), "the session of the server that ended")

    def opened_before(*given: Any, **named: Any) -> SealedClient:
        return SealedClient(*given[:-1], before if given[0].name == "client-3" else given[-1], **named)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("florana.federation.sealed_client.SealedClient", opened_before)
        result = execute(
            recipe, tmp_path / "run", show=lambda e: told.append(e.detail) if e.kind == "repaired" else None
        )
    (record,) = result.records
    assert told == ["a sum was opened just before the server ended: the clients train this round anew"]
    assert not record.refused
    assert len(record.clients) == 6
    plain = execute(recipe, tmp_path / "plain")
    assert record.train_loss != plain.records[0].train_loss  # other rows first: another update
    for attempt in (1, 2):  # on the last attempt it is left out, and the others go on
        before("here", (1, attempt, 0), "another")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("florana.federation.sealed_client.SealedClient", opened_before)
        (record,) = execute(recipe, tmp_path / "third").records
    assert record.refused == {"client-3": "keys: its sum was opened before"}
    assert len(record.clients) == 5


def test_a_dry_run_counts_the_numbers_of_secure_sums(recipe_table: dict[str, Any], tmp_path: Path) -> None:
    """Twenty bits each; the protocol's own messages come on top."""
    from florana.runs.dry_run import plan

    recipe = many(recipe_table, bits=20)
    setup = prepare(recipe)
    told = plan(recipe, setup)
    (record,) = execute(recipe, tmp_path / "run", setup=setup).records
    assert told.bytes_up < record.bytes_up < told.bytes_up + 6 * 6000
    assert told.bytes_down < record.bytes_down
