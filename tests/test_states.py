"""Hidden states that are kept give the log-probs, distributions and divergences of the model that they came from."""

import pytest
import torch
from transformers import Gemma2Config, Gemma2ForCausalLM

from baselines.divergences import divergence
from lm import states as module
from lm.logprobs import head_logprobs, sequence_logprobs
from lm.packing import pack
from lm.states import States, divergences, expected_shift, sequence_states, states_obstacle
from rescore import response_logprobs, score, tree_logprobs
from tests.conftest import SMALL

BUDGET = 64
CONTEXTS = [[5, 6, 7], [5, 6, 7, 8, 9, 11], [12, 13]]
RESPONSES = [[8, 9], [10], [14, 15, 16]]
GUIDED = [[20, 5, 6, 7], None, [21, 12, 13]]


def by_hand(model, context, response, temperature=1.0):
    """(tokens, V) log-probs of the whole vocabulary, one plain pass."""
    with torch.no_grad():
        logits = model(torch.tensor([context + response])).logits[0]
    return (logits / temperature).log_softmax(-1)[len(context) - 1 : -1]


def test_states_have_the_log_probs_of_a_plain_pass(llama):
    sequences = pack(CONTEXTS, RESPONSES)
    with torch.no_grad():
        expected, *places = sequence_logprobs(llama, sequences, 0.7)
        states, targets, *same = sequence_states(llama, sequences)
    assert all(torch.equal(a, b) for a, b in zip(places, same, strict=True))
    head = llama.get_output_embeddings()
    assert torch.allclose(head_logprobs(head, states, targets, 0.7, 10**9), expected, atol=1e-5)


def test_kept_states_know_where_they_belong(llama):
    states = States(llama, 3, 3)
    scored = response_logprobs(llama, GUIDED, RESPONSES, token_budget=BUDGET, states=states)
    assert torch.equal(states.known, ~scored.isnan())
    assert states.known[1].sum() == 0
    rows, columns = states.known.nonzero(as_tuple=True)
    whole = states.logprobs(rows, columns, 1.0)  # (n, V)
    chosen = [RESPONSES[r][c] for r, c in zip(rows.tolist(), columns.tolist(), strict=True)]
    assert torch.allclose(whole[range(len(chosen)), chosen], scored[rows, columns], atol=1e-5)
    expected = torch.cat([by_hand(llama, GUIDED[row], RESPONSES[row]) for row in (0, 2)])
    assert torch.allclose(whole, expected, atol=1e-4)


def test_branches_keep_theirs_behind_the_plain_ones(llama):
    states, branches = States(llama, 6, 3), [[5, 6, 30, 7], [5, 6, 7, 8, 31, 9, 11], None]
    plain, branch = tree_logprobs(llama, CONTEXTS, RESPONSES, branches, token_budget=BUDGET, states=states)
    for part, scored in ((states.of_rows(0, 3), plain), (states.of_rows(3, 6), branch)):
        assert torch.equal(part.known, ~scored.isnan())
        rows, columns = part.known.nonzero(as_tuple=True)
        chosen = [RESPONSES[r][c] for r, c in zip(rows.tolist(), columns.tolist(), strict=True)]
        assert torch.allclose(
            part.logprobs(rows, columns, 1.0)[range(len(chosen)), chosen], scored[rows, columns], atol=1e-4
        )


@pytest.mark.parametrize("chunk", [1, 10**9])
def test_the_expected_shift_is_the_sum_over_the_vocabulary(llama, qwen, chunk, monkeypatch):
    monkeypatch.setattr(module, "CHUNK", chunk)
    how = {"temperature": 0.8, "token_budget": BUDGET, "progress": lambda name: iter}
    keep: dict[str, States] = {}
    score({"old": llama, "reference": qwen}, qwen, CONTEXTS, RESPONSES, {"episode": GUIDED}, **how, keep=keep)
    assert keep.keys() == {"old", "reference", "episode"}
    for base, model in (("old", llama), ("reference", qwen)):
        got = expected_shift(keep["old"], keep["episode"], keep[base], 0.8)
        assert got.isnan().tolist() == [[False, False, True], [True] * 3, [False] * 3]
        for row in (0, 2):
            old = by_hand(llama, CONTEXTS[row], RESPONSES[row], 0.8)
            guided = by_hand(qwen, GUIDED[row], RESPONSES[row], 0.8)
            shift = guided - by_hand(model, CONTEXTS[row], RESPONSES[row], 0.8)
            assert torch.allclose(got[row][: len(old)], (old.exp() * shift).sum(-1), atol=1e-4)
    assert (expected_shift(keep["old"], keep["episode"], keep["old"], 0.8).nan_to_num() <= 1e-6).all()  # minus a KL


@pytest.mark.parametrize("chunk", [1, 10**9])
@pytest.mark.parametrize("kind", ["reverse", "forward", "jsd"])
def test_divergences_in_chunks_have_the_gradients_of_the_whole(kind, chunk, llama, qwen, monkeypatch):
    teacher = States(qwen, 3, 3)
    response_logprobs(qwen, GUIDED, RESPONSES, token_budget=BUDGET, states=teacher)
    rows, columns = teacher.known.nonzero(as_tuple=True)
    measure = lambda a, b: divergence(kind, a, b)

    def gradients(compute) -> list:
        llama.zero_grad()
        states, _, r, c = sequence_states(llama, pack(CONTEXTS, RESPONSES))
        place = {at: i for i, at in enumerate(zip(r.tolist(), c.tolist(), strict=True))}
        known = torch.tensor([place[at] for at in zip(rows.tolist(), columns.tolist(), strict=True)])
        terms = compute(states[known])
        (terms * torch.arange(1.0, len(terms) + 1)).sum().backward()
        return [terms.detach(), *(p.grad.clone() for p in llama.parameters())]

    head = llama.get_output_embeddings()
    theirs = teacher.logprobs(rows, columns, 0.9).detach()
    whole = gradients(lambda states: measure((head(states) / 0.9).log_softmax(-1), theirs))
    monkeypatch.setattr(module, "CHUNK", chunk)
    parts = gradients(lambda states: divergences(llama, states, teacher, rows, columns, measure, 0.9))
    for a, b in zip(whole, parts, strict=True):
        assert torch.allclose(a, b, atol=1e-4, rtol=1e-3)
    assert whole[0].abs().max() > 0.01


def test_where_nothing_was_guided_there_is_nothing_to_compare(llama):
    how = {"temperature": 0.8, "token_budget": BUDGET, "progress": lambda name: iter}
    keep: dict[str, States] = {}
    score({"old": llama}, llama, CONTEXTS, RESPONSES, {"episode": GUIDED, "step": [None] * 3}, **how, keep=keep)
    assert not keep["step"].known.any()
    assert expected_shift(keep["old"], keep["step"], keep["old"], 0.8).isnan().all()
    rows, columns = keep["step"].known.nonzero(as_tuple=True)
    own = torch.zeros(0, llama.config.hidden_size)
    assert divergences(llama, own, keep["step"], rows, columns, lambda a, b: (a - b).sum(-1), 0.8).shape == (0,)


@pytest.mark.parametrize("wider", ["policy", "teacher"])
def test_models_of_one_tokenizer_may_have_output_layers_padded_to_other_widths(wider, llama, qwen):
    """Words that no tokenizer has count for nothing: the divergence is that over the words of both."""
    (policy, teacher) = (llama, qwen)
    count = llama.config.vocab_size
    (policy if wider == "policy" else teacher).resize_token_embeddings(count + 8)
    kept, own = States(teacher, 3, 3), States(policy, 3, 3)
    response_logprobs(teacher, CONTEXTS, RESPONSES, token_budget=BUDGET, states=kept)
    response_logprobs(policy, CONTEXTS, RESPONSES, token_budget=BUDGET, states=own)
    rows, columns = kept.known.nonzero(as_tuple=True)
    measure = lambda a, b: divergence("reverse", a, b)
    got = divergences(policy, own.at_tokens(rows, columns), kept, rows, columns, measure, 1.0)
    p, q = (each.logprobs(rows, columns, 1.0)[:, :count].log_softmax(-1) for each in (own, kept))  # (n, V) each
    assert torch.allclose(got, measure(p, q), atol=1e-5)
    assert got.min() > 1e-3


def test_held_states_stay_what_they_were_while_the_model_learns(llama):
    """The scorer may be the sampling policy (--scorer old): pi_old does not move with the gradient steps."""
    states = States(llama, 3, 3)
    response_logprobs(llama, GUIDED, RESPONSES, token_budget=BUDGET, states=states)
    rows, columns = states.known.nonzero(as_tuple=True)
    before = states.logprobs(rows, columns, 1.0)  # (n, V)
    states.hold()
    with torch.no_grad():
        llama.get_output_embeddings().weight.mul_(1.5)
    assert torch.equal(states.logprobs(rows, columns, 1.0), before)
    assert torch.equal(states.of_rows(0, 3).logprobs(rows, columns, 1.0), before)
    own = states.at_tokens(rows, columns)  # (n, H)
    measure = lambda a, b: divergence("reverse", a, b)
    assert divergences(llama, own, states, rows, columns, measure, 1.0).min() > 1e-3
    frozen = States(llama.requires_grad_(False), 3, 3)
    frozen.hold()
    assert frozen.head is None  # what does not change needs no copy


def test_no_states_for_logits_that_are_not_simply_the_output_layers(llama):
    assert states_obstacle(llama) is None
    capped = Gemma2ForCausalLM(Gemma2Config(vocab_size=40, head_dim=12, **SMALL, final_logit_softcapping=5.0))
    assert "not simply" in states_obstacle(capped)
