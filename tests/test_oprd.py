"""Hidden states drawn to a teacher's: which layers and tokens, the loss by hand, and a run with either teacher."""

import copy
from types import SimpleNamespace

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from data import Batch, Step, Trajectory
from lm.distributions import layer_states
from lm.loading import frozen
from lm.scoring import pack
from tests.conftest import SMALL
from tests.test_variants import made, run, small  # noqa: F401 fixtures
from tiny.warmstart import tiny_model
from variants.oprd import Settings, oprd_loss, positions, proportional, representation_loss

CONTEXTS, RESPONSES = [[5, 6, 7], [5, 6, 7, 8, 9, 11], [12, 13]], [[8, 9], [10], [14, 15, 16]]


def by_hand(model, context, response):
    """(tokens, layers, H): what each layer puts out at the response's own positions, one plain pass."""
    with torch.no_grad():
        states = model(torch.tensor([context + response]), output_hidden_states=True).hidden_states
    return torch.stack([layer[0, len(context) :] for layer in states[1:]], 1)


@pytest.mark.parametrize(
    ("layers", "chosen"), [("all", [0, 1, 2, 3]), ("last", [3]), ("even", [0, 2]), ("odd", [1, 3])]
)
def test_states_are_those_of_the_layers_at_the_response_tokens(layers, chosen):
    torch.manual_seed(3)
    model = LlamaForCausalLM(LlamaConfig(vocab_size=40, **SMALL | {"num_hidden_layers": 4}))
    with torch.no_grad():
        states, (rows, columns) = layer_states(model, pack(CONTEXTS, RESPONSES), layers)
    assert states.shape[1] == len(chosen)
    for i, (row, column) in enumerate(zip(rows.tolist(), columns.tolist(), strict=True)):
        expected = by_hand(model, CONTEXTS[row], RESPONSES[row])[column, chosen]
        assert torch.allclose(states[i], expected, atol=1e-4)


def test_unknown_layers_are_refused(llama):
    with pytest.raises(ValueError, match="layers must be one of last, all, even, odd"):
        layer_states(llama, pack(CONTEXTS, RESPONSES), "first")


def test_layers_are_paired_in_proportion():
    """The numbers of the release's tests (verl/tests/utils/test_rep_distillation.py): 28 layers of 36."""
    pairs = proportional(28, 36)
    assert (len(pairs), pairs[0], pairs[-1]) == (28, 0, 35) and pairs[14] in (17, 18)
    assert proportional(4, 4).tolist() == [0, 1, 2, 3]
    assert proportional(1, 36).tolist() == [35]
    assert proportional(3, 1).tolist() == [0, 0, 0]


def test_first_and_last_tokens_of_each_response():
    columns, lengths = torch.tensor([0, 1, 2, 0, 0, 1]), torch.tensor([3, 3, 3, 1, 2, 2])
    assert positions(columns, lengths, "all").all()
    assert positions(columns, lengths, "first-1").tolist() == [True, False, False, True, True, False]
    assert positions(columns, lengths, "last-2").tolist() == [False, True, True, True, True, True]


def test_the_loss_by_hand():
    """Two layers of two dimensions. Layer 1 is off by (1, 2), layer 2 by nothing: (1 + 4 + 0 + 0) / 4. Of length 1:
    (3, 4)/5 against (2, 2)/sqrt 8, and 0."""
    student = torch.tensor([[[3.0, 4.0], [1.0, 0.0]]], requires_grad=True)
    teacher = torch.tensor([[[2.0, 2.0], [1.0, 0.0]]])
    assert representation_loss(student, teacher, normalize=False).item() == pytest.approx(1.25)
    unit = (torch.tensor([0.6, 0.8]) - torch.tensor([0.5, 0.5]).sqrt()).square().sum().item() / 4
    assert representation_loss(student, teacher, normalize=True).item() == pytest.approx(unit)
    representation_loss(student, teacher, normalize=False).sum().backward()
    assert torch.allclose(student.grad, torch.tensor([[[0.5, 1.0], [0.0, 0.0]]]))  # 2 difference / 4


GUIDED = {"episode": [[20, 5, 6, 7], None, None], "step": [None, None, [21, 12, 13]]}


def distance(policy, scorer=None, *, guided=GUIDED, teacher=None, **changes):
    """The loss of each token of the one micro-batch, (6,)."""
    steps = [Step((), "", h, y, "", "", True) for h, y in zip(CONTEXTS, RESPONSES, strict=True)]
    old = torch.full((3, 3), float("nan"))
    for row, response in enumerate(RESPONSES):
        old[row, : len(response)] = -1.0
    batch = Batch([Trajectory("", 0, steps, True)], [None], [[()] * 3], guided, old, None, {})
    names = {"scorer": "reference", "teacher": "larger" if teacher else None}
    config = Settings(algo="oprd", **names, **changes)
    models = {"reference": scorer, "teacher": teacher}
    one = SimpleNamespace(config=config, policy=policy, models=models)
    losses, terms = oprd_loss(one, pack(CONTEXTS, RESPONSES), batch)
    assert torch.equal(terms["loss/distill"], losses) and not terms["loss/policy"].any()
    return losses


def test_the_scorer_under_the_skill_is_the_teacher(llama):
    """Rows 0 and 2 have a skill; each of their tokens is as far off as two plain passes say, in any micro-batch."""
    guided = [[20, 5, 6, 7], None, [21, 12, 13]]
    scorer = copy.deepcopy(llama)
    for budget in (1, 10**6):
        got = distance(llama, scorer, token_budget=budget, oprd_weight=2.0)
        _, (rows, columns) = layer_states(llama, pack(CONTEXTS, RESPONSES), "all")
        for value, row, column in zip(got.tolist(), rows.tolist(), columns.tolist(), strict=True):
            if guided[row] is None:
                assert value == 0
                continue
            own, theirs = (by_hand(llama, context[row], RESPONSES[row])[column] for context in (CONTEXTS, guided))
            assert value == pytest.approx(2 * (own - theirs).square().mean().item(), rel=1e-3)
            assert value > 0.01
    nothing = {"episode": [None] * 3, "step": [None] * 3}
    assert distance(llama, scorer, guided=nothing).tolist() == [0] * 6


def test_a_scorer_in_another_precision(llama):
    """--frozen-dtype bfloat16: a third of a percent off, and no error."""
    scorer = copy.deepcopy(llama)
    exact, rounded = distance(llama, scorer), distance(llama, frozen(copy.deepcopy(scorer), "bfloat16"))
    assert torch.allclose(rounded, exact, rtol=0.1) and not torch.equal(rounded, exact)


def test_only_the_policy_is_moved(llama):
    scorer = copy.deepcopy(llama)
    distance(llama, scorer).sum().backward()
    assert all(p.grad is None for p in scorer.parameters())
    assert sum(p.grad.abs().sum() for p in llama.parameters() if p.grad is not None) > 0


def test_another_width_is_refused(llama, tokenizer):
    with pytest.raises(ValueError, match="differ in hidden size"):
        distance(llama, teacher=tiny_model(len(tokenizer), seed=0, width=72))


@pytest.mark.parametrize("larger", [False, True])
def test_descent_comes_to_the_teacher(larger, llama, tokenizer):
    scorer, teacher = copy.deepcopy(llama), tiny_model(len(tokenizer), seed=5, width=48) if larger else None
    optimizer, seen = torch.optim.Adam(llama.parameters(), 3e-3), []
    for _ in range(30):
        optimizer.zero_grad()
        loss = distance(llama, scorer, teacher=teacher).sum()
        loss.backward()
        optimizer.step()
        seen.append(loss.item())
    assert seen[-1] < 0.5 * seen[0]


def test_what_it_cannot_read_is_refused():
    for changes, message in (
        ({"scorer": "old"}, "--scorer reference, or --teacher"),
        ({"scorer": "reference", "shard": True}, "no --shard"),
        ({"scorer": "reference", "oprd_positions": "middle"}, "all, first-K or last-K, not 'middle'"),
        ({"scorer": "reference", "routing": "additive"}, "at most one teacher per token"),
    ):
        with pytest.raises(ValueError, match=message):
            Settings(algo="oprd", **changes)


def test_a_run_with_a_larger_teacher(run):  # noqa: F811
    config, (record,) = run("oprd", teacher="larger", oprd_layers="odd", oprd_positions="last-2", oprd_normalize=True)
    assert 0 < record["loss/distill"] < 1 and record["advantage/skill_abs"] > 0
    assert not config.levels  # no skills are written
