"""Which contexts a skill makes of which steps, and by which model each is scored."""

from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch

import rescore as rescore_module
from data import Skills
from lm.encoder import Encoder
from lm.loading import frozen_copy
from rescore import rescore, response_logprobs, skill_contexts, tree_logprobs
from router import route
from tests.playing import BUDGET, play, skill_logprobs
from tests.settings import laptop


@pytest.fixture
def played(tokenizer, compact_env, games):
    def play_some(model, style="chat"):
        torch.manual_seed(0)
        encoder = Encoder(tokenizer, style)
        return encoder, play(model, encoder, compact_env, games[:3], 2, max_new_tokens=6, context_limit=512)[0]

    return play_some


def rows_of(trajectories):
    steps = [step for trajectory in trajectories for step in trajectory.steps]
    return [step.context for step in steps], [step.response for step in steps]


def assert_same(a, b, tolerance=1e-4):
    assert torch.equal(a.isnan(), b.isnan())
    assert (a - b).abs().nan_to_num().max() < tolerance


def test_only_guided_steps_are_scored_and_an_empty_skill_slot_shifts_nothing(llama, played):
    encoder, trajectories = played(llama)
    skills = [Skills("s", "open every closed place", {1: "take apple"}), *[None] * (len(trajectories) - 1)]
    routes = [route(t, s, "critical-first") for s, t in zip(skills, trajectories, strict=True)]
    old = response_logprobs(llama, *rows_of(trajectories), token_budget=BUDGET)
    episode, _ = skill_logprobs(llama, encoder, trajectories, routes, "episode", context_limit=512)
    step, _ = skill_logprobs(llama, encoder, trajectories, routes, "step", context_limit=512)
    assert (~episode.isnan()).any(1).nonzero().flatten().tolist() == [0, 2, 3, 4]
    assert (~step.isnan()).any(1).nonzero().flatten().tolist() == [1]
    assert (episode - old).abs().nan_to_num().max() > 1e-3  # a skill in the context does shift
    contexts, _ = skill_contexts(encoder, trajectories, routes, "step", 512)
    assert [row for row, context in enumerate(contexts) if context] == [1]


@pytest.mark.parametrize("style", ["chat", "window"])
def test_skill_scores_equal_scoring_each_augmented_prompt_alone(style, llama, played):
    encoder, trajectories = played(llama, style)
    skills = [Skills("s", "open every closed place", {1: "take apple", 3: "go to bed"}) for _ in trajectories]
    routes = [route(t, s, "additive") for s, t in zip(skills, trajectories, strict=True)]
    for level in ("episode", "step"):
        packed, _ = skill_logprobs(llama, encoder, trajectories, routes, level, context_limit=512)
        plain, _ = skill_logprobs(llama, encoder, trajectories, routes, level, context_limit=512, packed=False)
        assert torch.equal(packed.isnan(), plain.isnan())
        assert (packed - plain).abs().nan_to_num().max() < 1e-4


def test_an_augmented_prompt_over_the_limit_is_left_unguided_and_counted(llama, played):
    encoder, trajectories = played(llama)
    skills = [Skills("s", "open every closed place " * 40) for _ in trajectories]
    routes = [route(t, s, "episode") for s, t in zip(skills, trajectories, strict=True)]
    longest = max(len(step.context) for t in trajectories for step in t.steps)
    scored, too_long = skill_logprobs(llama, encoder, trajectories, routes, "episode", context_limit=longest + 20)
    assert too_long == sum(len(t.steps) for t in trajectories) == len(scored)
    assert scored.isnan().all()


@pytest.mark.parametrize("style", ["chat", "window"])
def test_a_guided_context_has_its_skill_and_may_fill_the_limit_to_the_last_token(style, llama, played):
    encoder, (trajectory, *_) = played(llama, style)
    routes = [route(trajectory, Skills("s", "open every closed place"), "episode")]
    [*_, last], too_long = skill_contexts(encoder, [trajectory], routes, "episode", 512)
    assert "skill open every closed place" in encoder.tokenizer.decode(last) and too_long == 0
    limit = len(last) + len(trajectory.steps[-1].response)
    for room, kept in ((limit, True), (limit - 1, False)):
        contexts, _ = skill_contexts(encoder, [trajectory], routes, "episode", room)
        assert (contexts[-1] == last) is kept


READ = {  # (KL, scorer, plain) -> each pass: its model, what it reads
    (0.1, "old", True): ["old: plain, step", "reference: plain", "old: episode"],
    (0.1, "reference", True): ["old: plain", "reference: plain, step", "reference: episode"],
    (0.0, "old", True): ["old: plain, step", "old: episode"],
    (0.0, "reference", True): ["old: plain", "reference: step", "reference: episode"],
    (0.1, "old", False): ["old: step", "old: episode"],
    (0.1, "reference", False): ["reference: step", "reference: episode"],
}


@pytest.mark.parametrize(("kl", "scorer", "plain"), READ)
def test_each_score_is_that_of_its_own_model_and_context(kl, scorer, plain, llama, played, monkeypatch):
    """Policy and, for the KL term, reference read h, the scorer h^; step skills cost a pass of their own only where the
    scorer reads no h."""
    encoder, trajectories = played(llama)
    models = {name: frozen_copy(llama) for name in ("old", "reference")}
    with torch.no_grad():
        models["reference"].lm_head.weight.add_(0.01)
        next(models["reference"].parameters()).mul_(1.05)
    passes, reading = [], []
    name_of = lambda model: next(name for name, known in models.items() if known is model)

    def tree(model, contexts, responses, branches, *, branches_only, **limits):
        kinds = ["plain"] * (not branches_only) + ["step"] * any(branches)
        passes.append(f"{name_of(model)}: {', '.join(kinds)}")
        return tree_logprobs(model, contexts, responses, branches, branches_only=branches_only, **limits)

    def alone(model, *rows, **limits):
        passes.append(f"{name_of(model)}: episode")
        return response_logprobs(model, *rows, **limits)

    monkeypatch.setattr(rescore_module, "tree_logprobs", tree)
    monkeypatch.setattr(rescore_module, "response_logprobs", alone)
    config = laptop(kl=kl, scorer=scorer, temperature=0.7, token_budget=64, routing="additive", context_limit=512)
    run = SimpleNamespace(config=config, encoder=encoder, levels=config.levels, models=models)
    run.reading = lambda model: reading.append(name_of(model)) or nullcontext()
    skills = [Skills("s", "open every closed place", {1: "take apple"}), *[None] * (len(trajectories) - 1)]
    routes = [route(t, s, config.routing) for t, s in zip(trajectories, skills, strict=True)]

    batch, metrics = rescore(run, trajectories, skills, routes, plain=plain)
    assert passes == READ[kl, scorer, plain]
    assert reading == [text.split(":")[0] for text in passes]  # each pass in the run's precision, its model in place
    assert (batch.trajectories, batch.skills, batch.routes) == (trajectories, skills, routes)

    contexts, responses = rows_of(trajectories)
    limits = {"temperature": 0.7, "token_budget": BUDGET}
    if plain:
        assert_same(batch.old_logprobs, response_logprobs(models["old"], contexts, responses, **limits))
        assert batch.mask.sum() == sum(map(len, responses))
    else:
        assert batch.old_logprobs is None or batch.old_logprobs.isnan().all()
    if plain and kl:
        assert_same(batch.reference_logprobs, response_logprobs(models["reference"], contexts, responses, **limits))
    else:
        assert batch.reference_logprobs is None or batch.reference_logprobs.isnan().all()
    assert sorted(batch.skill_logprobs) == sorted(batch.skill_contexts) == ["episode", "step"]
    for level, guided in (("episode", [0, 1, 2, 3, 4]), ("step", [1])):
        h_skill, _ = skill_contexts(encoder, trajectories, routes, level, 512)
        assert batch.skill_contexts[level] == h_skill
        assert [row for row, context in enumerate(h_skill) if context] == guided
        assert_same(batch.skill_logprobs[level], response_logprobs(models[scorer], h_skill, responses, **limits))
        assert metrics[f"guided/{level}"] == pytest.approx(len(guided) / len(contexts))
        assert metrics[f"guided/{level}_too_long"] == 0


@pytest.mark.parametrize("kl", [0.0, 0.1])
def test_without_a_level_nothing_but_plain_contexts_is_read(kl, llama, played):
    encoder, trajectories = played(llama)
    models = {"old": llama, "reference": frozen_copy(llama)}
    run = SimpleNamespace(config=laptop(kl=kl), encoder=encoder, levels=(), models=models)
    run.reading = lambda model: nullcontext()
    none = [None] * len(trajectories)
    batch, metrics = rescore(run, trajectories, none, [route(t, None, "critical-first") for t in trajectories])
    assert metrics == batch.skill_logprobs == batch.skill_contexts == {}
    assert_same(batch.old_logprobs, response_logprobs(llama, *rows_of(trajectories), token_budget=BUDGET))
    assert (batch.reference_logprobs is None) is (kl == 0)
