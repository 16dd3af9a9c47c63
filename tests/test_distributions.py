"""Whole distributions, made of hidden states, are those of the model that the states came from."""

import pytest
import torch
from transformers import Gemma2Config, Gemma2ForCausalLM

from lm import distributions as module
from lm.distributions import (
    distribution,
    divergence,
    divergences,
    sequence_states,
    states_and_logprobs,
    states_obstacle,
)
from lm.scoring import graft, head_logprobs, pack, sequence_logprobs
from tests.conftest import SMALL

CONTEXTS = [[5, 6, 7], [5, 6, 7, 8, 9, 11], [12, 13]]
RESPONSES = [[8, 9], [10], [14, 15, 16]]
GUIDED = [[20, 5, 6, 7], None, [21, 12, 13]]


def by_hand(model, context, response, temperature=1.0):
    """(tokens, V) log-probs of the whole vocabulary, one plain pass."""
    with torch.no_grad():
        logits = model(torch.tensor([context + response])).logits[0]
    return (logits / temperature).log_softmax(-1)[len(context) - 1 : -1]


@torch.no_grad()
def guided_states(model):
    """-> (states (m, H) of the responses under their second contexts, and where in the batch they belong)."""
    states, _, at = sequence_states(model, pack(GUIDED, RESPONSES))
    return states, at


def test_states_have_the_log_probs_of_a_plain_pass(llama):
    sequences = pack(CONTEXTS, RESPONSES)
    with torch.no_grad():
        expected, at = sequence_logprobs(llama, sequences, 0.7)
        states, targets, same = sequence_states(llama, sequences)
        both, logprobs, again = states_and_logprobs(llama, sequences, 0.7)
    for places in (same, again):
        assert all(torch.equal(a, b) for a, b in zip(places, at, strict=True))
    assert torch.allclose(
        head_logprobs(llama.get_output_embeddings(), states, targets, 0.7, 10**9), expected, atol=1e-5
    )
    assert torch.equal(both, states) and torch.allclose(logprobs, expected, atol=1e-5)


def test_states_know_where_they_belong(llama):
    states, at = guided_states(llama)
    assert set(at[0].tolist()) == {0, 2}
    whole = distribution(llama.get_output_embeddings(), states, 0.8)  # (m, V)
    for log_probs, row, column in zip(whole, *at, strict=True):
        expected = by_hand(llama, GUIDED[row], RESPONSES[row], 0.8)[column]
        assert torch.allclose(log_probs, expected, atol=1e-4)


def test_branches_have_theirs_behind_the_plain_ones(llama):
    branches = [[5, 6, 30, 7], [5, 6, 7, 8, 31, 9, 11], None]
    trees = graft(pack(CONTEXTS, RESPONSES), branches, RESPONSES, 64)
    assert any(tree.branches for tree in trees)
    with torch.no_grad():
        states, _, at = sequence_states(llama, trees)
    whole = distribution(llama.get_output_embeddings(), states, 1.0)  # (n, V)
    assert sorted(set(at[0].tolist())) == [0, 1, 2, 3, 4]
    for log_probs, row, column in zip(whole, *at, strict=True):
        context = (CONTEXTS + branches)[row]
        assert torch.allclose(log_probs, by_hand(llama, context, RESPONSES[row % 3])[column], atol=1e-4)


@pytest.mark.parametrize("chunk", [1, 10**9])
@pytest.mark.parametrize("kind", ["reverse", "forward", "jsd"])
def test_divergences_in_chunks_have_the_gradients_of_the_whole(kind, chunk, llama, qwen, monkeypatch):
    theirs, (rows, columns) = guided_states(qwen)
    measure = lambda a, b: divergence(kind, a, b)
    heads = llama.get_output_embeddings(), qwen.get_output_embeddings()

    def gradients(compute) -> list:
        llama.zero_grad()
        states, _, (r, c) = sequence_states(llama, pack(CONTEXTS, RESPONSES))
        place = {at: i for i, at in enumerate(zip(r.tolist(), c.tolist(), strict=True))}
        known = torch.tensor([place[at] for at in zip(rows.tolist(), columns.tolist(), strict=True)])
        terms = compute(states[known])
        (terms * torch.arange(1.0, len(terms) + 1)).sum().backward()
        return [terms.detach(), *(p.grad.clone() for p in llama.parameters())]

    teacher = distribution(heads[1], theirs, 0.9).detach()
    whole = gradients(lambda states: measure((heads[0](states) / 0.9).log_softmax(-1), teacher))
    monkeypatch.setattr(module, "CHUNK", chunk)
    parts = gradients(lambda states: divergences(heads[0], states, heads[1], theirs, measure, 0.9))
    for a, b in zip(whole, parts, strict=True):
        assert torch.allclose(a, b, atol=1e-4, rtol=1e-3)
    assert whole[0].abs().max() > 0.01
    assert all(p.grad is None for p in qwen.parameters())  # only the policy is moved


def test_where_nothing_was_guided_there_is_nothing_to_compare(llama):
    head, own = llama.get_output_embeddings(), torch.zeros(0, llama.config.hidden_size)
    assert divergences(head, own, head, own, lambda a, b: (a - b).sum(-1), 0.8).shape == (0,)


@pytest.mark.parametrize("wider", ["policy", "teacher"])
def test_models_of_one_tokenizer_may_have_output_layers_padded_to_other_widths(wider, llama, qwen):
    """Words that no tokenizer has count for nothing: the divergence is that over the words of both."""
    policy, teacher = llama, qwen
    count = llama.config.vocab_size
    (policy if wider == "policy" else teacher).resize_token_embeddings(count + 8)
    (own, _), (theirs, _) = guided_states(policy), guided_states(teacher)
    heads = policy.get_output_embeddings(), teacher.get_output_embeddings()
    measure = lambda a, b: divergence("reverse", a, b)
    got = divergences(heads[0], own, heads[1], theirs, measure, 1.0)
    p, q = (head(x)[:, :count].log_softmax(-1) for head, x in zip(heads, (own, theirs), strict=True))  # (m, V) each
    assert torch.allclose(got, measure(p, q), atol=1e-5)
    assert got.min() > 1e-3


def test_no_states_for_logits_that_are_not_simply_the_output_layers(llama):
    assert states_obstacle(llama) is None
    capped = Gemma2ForCausalLM(Gemma2Config(vocab_size=40, head_dim=12, **SMALL, final_logit_softcapping=5.0))
    assert "not simply" in states_obstacle(capped)
