"""The space of configs: what is suggested, listed, near and fixed is valid and agrees."""

import random
from dataclasses import replace
from itertools import islice, product

import optuna
import pytest
from told import Told

from flashtune.kernels.backends.target import default_config, target_of
from flashtune.kernels.plans.candidate import PLANS, Candidate
from flashtune.kernels.plans.config import Config, config_data, enabled, knobs, parse_config
from flashtune.kernels.plans.persistent import PersistentConfig
from flashtune.kernels.plans.staged import StagedConfig
from flashtune.kernels.predict.stages.registry import PLAN_STAGES
from flashtune.tuner.search.proposal import Proposals
from flashtune.tuner.search.session import SearchRequest, Session
from flashtune.tuner.search.space import Space, parse_fixed
from flashtune.tuning_db.device import Device, all_devices, find_device
from flashtune.tuning_db.errors import FlashtuneError
from flashtune.tuning_db.problem import Problem
from flashtune.tuning_db.record import Record
from flashtune.tuning_db.store import Store
from flashtune.tuning_db.table import prebuilt_table

QWEN = Problem(vocab_size=151936, hidden_size=2048, n_clusters=9496, n_probes=256)
TINY = Problem(vocab_size=512, hidden_size=64, n_clusters=32, n_probes=4)
H200 = find_device("h200")
FIXINGS = (
    {},
    {"plan": "persistent"},
    {"selection": "in_gather", "slack": 32},
    {"pdl": True},
    {"score_block": 512, "evict": "no_hint"},
    {"gather_rows": 1},  # not a choice of the persistent plan
)


@pytest.fixture(params=FIXINGS, ids=str)
def space(request: pytest.FixtureRequest) -> Space:
    return Space(QWEN, H200, request.param)


def draw(space: Space, count: int) -> list[Config]:
    """Valid configs as a study's trials ask for them."""
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=1))
    found: list[Config] = []
    for _ in range(4000):
        trial = study.ask()
        config, reason = space.suggest(trial)
        assert trial.params == space.parameters(config)
        assert trial.distributions == space.distributions(config)
        assert reason == Candidate(space.problem, config, space.device).why_invalid()
        found += [config] if reason is None else []
        if len(found) == count:
            return found
    raise AssertionError(f"only {len(found)} valid configs were drawn")


def obeys(config: Config, fixed: dict[str, object]) -> bool:
    """Whether a config has every fixed value that matters to it."""
    data = config_data(config)
    return fixed.get("plan", config.plan) == config.plan and all(
        data[name] == value
        for name, value in fixed.items()
        if name in knobs(type(config)) and enabled(type(config), name, data)
    )


def test_what_is_suggested_parses_and_obeys(space: Space) -> None:
    for config in draw(space, 20):
        assert parse_config(config_data(config)) == config
        assert obeys(config, dict(space.fixed))
        assert space.holds(config_data(config))


def test_a_trial_given_the_parameters_suggests_the_config(space: Space) -> None:
    study = optuna.create_study()
    for config in draw(space, 5):
        parameters = space.parameters(config)
        assert parameters is not None
        trial = study.ask(space.distributions(config))
        assert set(trial.params) == set(parameters)
        study.enqueue_trial(parameters)
        assert space.suggest(study.ask()) == (config, None)


def test_neighbours_are_valid_and_differ_in_one_knob(space: Space) -> None:
    for config in draw(space, 10):
        data, near = config_data(config), space.neighbours(config)
        assert near
        assert len(near) == len(set(near))
        assert config not in near
        for other in near:
            assert Candidate(space.problem, other, space.device).why_invalid() is None
            assert parse_config(config_data(other)) == other
            assert obeys(other, dict(space.fixed))
            changed = [name for name, value in config_data(other).items() if data[name] != value]
            plan = type(config)
            free = [
                name for name in changed
                if enabled(plan, name, data) and enabled(plan, name, config_data(other))
            ]  # fmt: skip
            assert len(free) == 1, changed


def test_every_choice_of_a_knob_that_is_valid_is_a_neighbour() -> None:
    config = default_config(QWEN, H200)
    near = {each for each in Space(QWEN, H200).neighbours(config)}
    for slack in (0, 8, 32, 64):
        assert parse_config({**config_data(config), "slack": slack}) in near


def test_starts_are_valid_and_obey(space: Space) -> None:
    for problem in (QWEN, TINY):
        for device in (H200, find_device("orin")):
            here = Space(problem, device, space.fixed)
            for config in here.starts():
                assert here.holds(config_data(config))
                assert obeys(config, dict(space.fixed))


def streams(device: Device) -> bool:
    """Whether a device has the bulk copies; all of these have room for rows of Qwen3-VL-2B."""
    return device.capability >= 90


def test_every_device_has_starts_of_each_family() -> None:
    for device in all_devices():
        families = {Space(QWEN, device).family(each) for each in Space(QWEN, device).starts()}
        assert families == {
            "staged/threshold",
            "staged/in_gather",
            "persistent",
            "batched",
            "dense",
            *(["streamed"] if streams(device) else []),
        }


def test_configs_lists_each_valid_config_once() -> None:
    """As many as there are when every combination of choices is tried."""
    persistent = {"plan": "persistent", "evict": "no_hint", "slab_stages": 1, "pdl": False,
                  "prefetch_margin": -1, "score_unroll": 1, "gather_unroll": 1,
                  "score_stages": 1, "gather_stages": 1, "slack": 16,
                  "gather_block": 64}  # fmt: skip
    staged = {"plan": "staged", "score_rows": 2, "score_stages": 1, "score_unroll": 1,
              "score_programs_per_sm": 0, "gather_stages": 1, "gather_unroll": 1,
              "gather_block": 64, "evict": "no_hint", "pdl": False, "score_block": 64,
              "gather_warps": 4, "slack": 16, "score_warps": 2}  # fmt: skip
    streamed = {"plan": "streamed", "score_warps": 8, "slack": 16}
    for fixed in (persistent, staged, streamed):
        plan = PLANS[str(fixed["plan"])].config
        choices = [(fixed[name],) if name in fixed else knob["choices"]
                   for name, knob in knobs(plan).items()]  # fmt: skip
        expected = set()
        for values in product(*choices):
            try:
                config = parse_config(
                    {"plan": plan.plan, **dict(zip(knobs(plan), values, strict=True))}
                )
            except FlashtuneError:
                continue  # a knob that does not matter is not at its default
            if Candidate(TINY, config, H200).why_invalid() is None:
                expected.add(config)
        listed = list(Space(TINY, H200, fixed).configs())
        assert len(listed) == len(set(listed))
        assert set(listed) == expected
        assert len(listed) > 50


@pytest.mark.parametrize("fixed", FIXINGS, ids=str)
def test_the_first_configs_are_valid_and_obey(fixed: dict[str, object]) -> None:
    space = Space(QWEN, H200, fixed)
    for config in islice(space.configs(), 200):
        assert space.holds(config_data(config))
        assert obeys(config, fixed)


def test_a_config_outside_what_is_fixed_is_not_held() -> None:
    config = config_data(default_config(QWEN, H200))
    assert Space(QWEN, H200).holds(config)
    assert Space(QWEN, H200, {"slack": 16}).holds(config)
    assert not Space(QWEN, H200, {"slack": 8}).holds(config)
    assert not Space(QWEN, H200, {"plan": "persistent"}).holds(config)
    assert not Space(QWEN, H200).holds({**config, "slack": 7})
    assert not Space(QWEN, H200).holds({**config, "plan": "../../x"})
    assert not Space(QWEN, H200).holds({**config, "score_rows": True})
    assert not Space(QWEN, H200).holds({**config, "gather_block": 4096})


def test_a_value_of_one_plan_alone_leaves_that_plan() -> None:
    assert Space(QWEN, H200).plans == ["staged", "persistent", "batched", "dense", "streamed"]
    assert Space(QWEN, H200, without=frozenset(["dense", "staged"])).plans == [
        "persistent",
        "batched",
        "streamed",
    ]
    assert Space(QWEN, H200, {"early": False}).plans == ["streamed"]
    assert Space(QWEN, H200, {"gather_rows": 1}).plans == ["staged"]
    assert Space(QWEN, H200, {"gather_rows": 1, "plan": "persistent"}).plans == []
    assert Space(QWEN, H200, {"programs_per_sm": 2}).plans == ["persistent"]
    assert Space(QWEN, H200, {"selection": "in_gather"}).plans == ["staged"]
    in_triton = ["staged", "persistent", "batched", "dense"]
    assert Space(QWEN, H200, {"evict": "no_hint"}).plans == in_triton


def test_fixed_values_are_read_as_their_choices_are() -> None:
    assert parse_fixed("plan=persistent") == ("plan", "persistent")
    assert parse_fixed("score_rows=16") == ("score_rows", 16)
    assert parse_fixed("prefetch_margin=-1") == ("prefetch_margin", -1)
    assert parse_fixed("pdl=true") == ("pdl", True)
    assert parse_fixed("pdl=False") == ("pdl", False)


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("nonsense=1", "unknown knob 'nonsense': use plan, selection,"),
        ("", "unknown knob ''"),
        ("slack", "slack must be one of 0, 8, 16, 32, 64, not ''"),
        ("slack=7", "slack must be one of 0, 8, 16, 32, 64, not '7'"),
        ("slack=16=16", "slack must be one of"),
        ("plan=../../x", "plan must be one of staged, persistent"),
        ("score_rows=1); import os", "score_rows must be one of"),
    ],
)
def test_what_is_fixed_wrongly_is_explained(text: str, error: str) -> None:
    with pytest.raises(FlashtuneError) as caught:
        parse_fixed(text)
    assert str(caught.value).startswith(error)


@pytest.mark.parametrize(
    "fixed",
    [{"nonsense": 1}, {"slack": 7}, {"plan": "x"}, {"score_rows": "1); import os"}],
    ids=str,
)
def test_a_space_refuses_what_does_not_exist(fixed: dict[str, object]) -> None:
    with pytest.raises(FlashtuneError, match=r"unknown knob 'nonsense'|must be one of"):
        Space(QWEN, H200, fixed)


@pytest.mark.timeout(20)
@pytest.mark.parametrize(
    ("problem", "fixed"),
    [
        (QWEN, {"pdl": True}),  # not on an Orin
        (QWEN, {"plan": "persistent", "prefetch_margin": 5}),
        (QWEN, {"selection": "in_gather", "plan": "staged", "prefetch_margin": 5}),
        (QWEN, {"plan": "persistent", "gather_rows": 1}),
        (QWEN, {"score_stages": 2, "score_unroll": 2}),
        (QWEN, {"plan": "staged", "gather_warps": 32, "gather_rows": 1, "gather_block": 64}),
        (TINY, {"score_block": 4096}),
        (TINY, {"plan": "staged", "gather_stages": 4}),
    ],
    ids=str,
)  # fmt: skip
def test_a_session_says_at_once_that_nothing_is_left(
    store: Store, device: Device, problem: Problem, fixed: dict[str, object]
) -> None:
    request = SearchRequest(device=device, problems=[problem], trials=1, fixed=fixed)
    with pytest.raises(FlashtuneError) as caught:
        Session(request, store)
    text = str(caught.value)
    assert text.startswith(f"no valid config for {problem.describe()} on orin-nano-super with")
    assert text.endswith("fix fewer knobs")
    assert all(name in text for name in fixed)


@pytest.mark.timeout(20)
@pytest.mark.parametrize(
    "fixed",
    [{"score_warps": 8}, {"gather_warps": 32}, {"warps": 16}, {"score_unroll": 4},
     {"plan": "persistent", "score_rows": 1, "score_block": 4096, "warps": 4}],
    ids=str,
)  # fmt: skip
def test_a_session_begins_at_once_where_little_is_left(
    store: Store, fixed: dict[str, object]
) -> None:
    wide = Problem(vocab_size=151936, hidden_size=8192, n_clusters=9496, n_probes=256)
    Session(SearchRequest(device=H200, problems=[wide], trials=1, fixed=fixed), store)
    assert next(Space(wide, H200, fixed).configs()) is not None


def test_a_session_says_which_plan_it_cannot_search(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A plan without stages is not predicted; on an Orin `streamed` would not run at all."""
    searched = []

    def search(space: Space, *_: object, **__: object) -> None:
        searched.append(space.plans)
        raise KeyboardInterrupt

    monkeypatch.setattr("flashtune.tuner.search.session.Search", search)
    monkeypatch.delitem(PLAN_STAGES, "streamed")
    in_triton = ["staged", "persistent", "batched", "dense"]
    for device, said in ((H200, "plan streamed cannot be predicted"), (find_device("orin"), "")):
        display = Told()
        Session(SearchRequest(device=device, problems=[QWEN], trials=1), store).run(display)
        assert (said in display.notes[0]) if said else (display.notes == [])
    assert searched[0] == in_triton
    fixed = {"plan": "streamed"}
    with pytest.raises(FlashtuneError, match="search on the machine itself"):
        Session(SearchRequest(device=H200, problems=[QWEN], trials=1, fixed=fixed), store)


def test_a_session_that_measures_searches_what_can_be_built(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("flashtune.tuner.search.session.devices_here", lambda: (H200,))
    request = SearchRequest(device=H200, problems=[QWEN], trials=1, fixed={"plan": "streamed"})
    Session(request, store)
    why = "plan streamed needs what is not here"
    missing = replace(
        target_of(H200), why_missing=lambda plan: why if plan.name == "streamed" else None
    )
    monkeypatch.setattr("flashtune.tuner.search.session.target_of", lambda _: missing)
    with pytest.raises(FlashtuneError, match=why):
        Session(request, store)


def test_families_are_plans_and_what_selects() -> None:
    space = Space(QWEN, H200)
    assert space.family(StagedConfig(selection="in_gather")) == "staged/in_gather"
    assert space.family(PersistentConfig(warps=4)) == "persistent"


def test_random_spaces_agree_with_their_rules() -> None:
    """Any knobs fixed to any values: the first config listed is held, and so are starts."""
    generator = random.Random(7)
    names = [name for plan in PLANS.values() for name in knobs(plan.config)]
    for _ in range(60):
        fixed = {}
        for name in generator.sample(names, 3):
            plan = generator.choice(
                [plan.config for plan in PLANS.values() if name in knobs(plan.config)]
            )
            fixed[name] = generator.choice(knobs(plan)[name]["choices"])
        space = Space(QWEN, generator.choice(all_devices()), fixed)
        for config in [*islice(space.configs(), 3), *space.starts()]:
            assert space.holds(config_data(config)), (fixed, config)
            assert obeys(config, fixed)


def test_a_session_tries_what_ships_for_the_very_problem(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It goes before other problems' records, and as one more config to be evaluated."""
    tried = []

    def search(space: Space, *_: object, near: list[Record], **__: object) -> None:
        tried.extend(islice(Proposals(space, sampler="random", seed=0, near=near), 3))
        raise KeyboardInterrupt

    monkeypatch.setattr("flashtune.tuner.search.session.Search", search)
    orin = find_device("orin")
    Session(SearchRequest(device=orin, problems=[QWEN], trials=1), store).run(Told())
    table = prebuilt_table(orin.name)
    assert table is not None
    own = [record.config for record in table.records if record.problem == QWEN]
    assert config_data(tried[2]) in own  # after the default and the baseline
