"""Log-probs of responses: hand-made numbers, the shift, and packing that changes no number."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from data import Skills
from envs.alfworld import AlfworldEnv
from rescore import guided_steps, micro_batches, pack, response_logprobs, sequence_logprobs, skill_logprobs
from rollout import Encoder, rollout
from router import route


class Bigram(torch.nn.Module):
    """A model whose next-token distribution depends on the current token alone: log-probs can be read off a table."""

    device = torch.device("cpu")

    def __init__(self, vocabulary=5):
        super().__init__()
        self.table = torch.nn.Parameter(
            torch.arange(vocabulary * vocabulary).float().view(vocabulary, vocabulary).sin()
        )

    def forward(self, input_ids, attention_mask, logits_to_keep, use_cache):
        return type("Output", (), {"logits": self.table[input_ids[logits_to_keep]]})


def test_the_logits_before_a_token_predict_it():
    #  position:   0  1  2 | 3  4        scored: 3 given 2, 1 given 3
    model = Bigram()
    expected = model.table.log_softmax(-1)
    got = response_logprobs(model, [[0, 4, 2]], [[3, 1]])
    assert torch.allclose(got, torch.stack([expected[2, 3], expected[3, 1]])[None])


def test_temperature_divides_the_logits():
    model = Bigram()
    expected = (model.table / 0.5).log_softmax(-1)[2, 3]
    assert torch.allclose(response_logprobs(model, [[2]], [[3]], temperature=0.5)[0, 0], expected)


def test_short_rows_end_in_nan():
    got = response_logprobs(Bigram(), [[0], [1, 2]], [[1], [2, 3, 4]])
    assert got.isnan().tolist() == [[False, True, True], [False, False, False]]


def test_gradient_flows_to_the_right_row():
    model = Bigram()
    logprobs, rows, columns = sequence_logprobs(model, pack([[0], [4]], [[1], [2]]), 1.0)
    assert rows.tolist() == [0, 1]
    assert columns.tolist() == [0, 0]
    logprobs[0].backward()
    assert model.table.grad[0].abs().sum() > 0
    assert model.table.grad[1:].abs().sum() == 0


def test_pack_merges_rows_that_extend_one_another():
    #  row 0: [1 2] -> [3]   row 1: [1 2 3 7] -> [4 5]   row 2: another conversation
    sequences = pack([[1, 2], [1, 2, 3, 7], [1, 2]], [[3], [4, 5], [9]])
    assert [s.ids for s in sequences] == [[1, 2, 3, 7, 4, 5], [1, 2, 9]]
    assert [s.responses for s in sequences] == [[(0, 2, 1), (1, 4, 2)], [(2, 2, 1)]]
    assert len(pack([[1, 2], [1, 2, 3, 7]], [[3], [4]], packed=False)) == 2


@pytest.mark.parametrize(("contexts", "responses", "message"), [([[]], [[1]], "context"), ([[1]], [[]], "response")])
def test_nothing_to_score_is_an_error(contexts, responses, message):
    with pytest.raises(ValueError, match=f"empty {message}"):
        pack(contexts, responses)


tokens = st.lists(st.integers(0, 4), min_size=1, max_size=6)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.lists(st.tuples(tokens, tokens), min_size=1, max_size=4), min_size=1, max_size=4), st.integers(1, 40)
)
def test_any_conversations_score_the_same_packed_or_not(conversations, budget):
    contexts, responses = [], []
    for turns in conversations:
        history = []
        for chunk, response in turns:
            contexts.append(history + chunk)
            responses.append(response)
            history = history + chunk + response
    model = Bigram()
    plain = response_logprobs(model, contexts, responses, packed=False, token_budget=10_000)
    packed = response_logprobs(model, contexts, responses, token_budget=budget)
    assert torch.equal(plain.isnan(), packed.isnan())
    assert torch.allclose(plain.nan_to_num(), packed.nan_to_num())
    batches = micro_batches(pack(contexts, responses), budget)
    assert all(len(batch) == 1 or len(batch) * max(len(s.ids) for s in batch) <= budget for batch in batches)
    assert sorted(row for batch in batches for s in batch for row, _, _ in s.responses) == list(range(len(contexts)))


@pytest.fixture
def played(tokenizer, compact_env, games):
    def play(model, style="chat"):
        torch.manual_seed(0)
        encoder = Encoder(tokenizer, style)
        return encoder, rollout(model, encoder, compact_env, games[:3], 2, max_new_tokens=6, context_limit=512)[0]

    return play


def rows_of(trajectories):
    steps = [step for trajectory in trajectories for step in trajectory.steps]
    return [step.context for step in steps], [step.response for step in steps]


@pytest.mark.parametrize("architecture", ["llama", "qwen"])
def test_packed_equals_plain_on_rollouts(architecture, played, request):
    model = request.getfixturevalue(architecture)
    _, trajectories = played(model)
    contexts, responses = rows_of(trajectories)
    assert len(pack(contexts, responses)) == len(trajectories) < len(contexts)
    plain = response_logprobs(model, contexts, responses, packed=False)
    packed = response_logprobs(model, contexts, responses)
    assert torch.equal(plain.isnan(), packed.isnan())
    assert (plain - packed).abs().nan_to_num().max() < 1e-4
    assert plain.nanmean().abs() > 0.1


def test_packing_changes_no_gradient(llama, played):
    contexts, responses = rows_of(played(llama)[1])
    gradients = []
    for packed in (True, False):
        llama.zero_grad()
        sequence_logprobs(llama, pack(contexts, responses, packed=packed), 1.0)[0].sum().backward()
        gradients.append(torch.cat([p.grad.flatten() for p in llama.parameters()]))
    assert torch.allclose(gradients[0], gradients[1], rtol=1e-3, atol=1e-2 * gradients[0].abs().mean().item())


def test_only_guided_steps_are_scored_and_an_empty_skill_slot_shifts_nothing(llama, played):
    encoder, trajectories = played(llama)
    skills = [Skills("s", "open every closed place", {1: "take apple"}), *[None] * (len(trajectories) - 1)]
    routes = [route(s, len(t.steps), "critical-first") for s, t in zip(skills, trajectories, strict=True)]
    old = response_logprobs(llama, *rows_of(trajectories))
    episode, _ = skill_logprobs(llama, encoder, trajectories, routes, "episode", context_limit=512)
    step, _ = skill_logprobs(llama, encoder, trajectories, routes, "step", context_limit=512)
    assert (~episode.isnan()).any(1).nonzero().flatten().tolist() == [0, 2, 3, 4]
    assert (~step.isnan()).any(1).nonzero().flatten().tolist() == [1]
    assert (episode - old).abs().nan_to_num().max() > 1e-3  # a skill in the context does shift
    assert [row for row, *_ in guided_steps(trajectories, routes, "step")] == [1]


@pytest.mark.parametrize("style", ["chat", "window"])
def test_skill_scores_equal_scoring_each_augmented_prompt_alone(style, llama, played):
    encoder, trajectories = played(llama, style)
    skills = [Skills("s", "open every closed place", {1: "take apple", 3: "go to bed"}) for _ in trajectories]
    routes = [route(s, len(t.steps), "additive") for s, t in zip(skills, trajectories, strict=True)]
    for level in ("episode", "step"):
        packed, _ = skill_logprobs(llama, encoder, trajectories, routes, level, context_limit=512)
        plain, _ = skill_logprobs(llama, encoder, trajectories, routes, level, context_limit=512, packed=False)
        assert torch.equal(packed.isnan(), plain.isnan())
        assert (packed - plain).abs().nan_to_num().max() < 1e-4


def test_an_augmented_prompt_over_the_limit_is_left_unguided_and_counted(llama, played):
    encoder, trajectories = played(llama)
    skills = [Skills("s", "open every closed place " * 40) for _ in trajectories]
    routes = [route(s, len(t.steps), "episode") for s, t in zip(skills, trajectories, strict=True)]
    longest = max(len(step.context) for t in trajectories for step in t.steps)
    scored, too_long = skill_logprobs(llama, encoder, trajectories, routes, "episode", context_limit=longest + 20)
    assert too_long == sum(len(t.steps) for t in trajectories) == len(scored)
    assert scored.isnan().all()


def test_smollm2_packed_equals_plain_over_ten_turns(smollm2, games):
    """The real model, float32, trajectories of 10 turns: to 1e-4. (benchmarks/score.py times it, on long prompts.)"""
    model, tokenizer = smollm2
    torch.manual_seed(0)
    make_env = lambda: AlfworldEnv(prompt="compact", max_steps=10)
    encoder = Encoder(tokenizer, "chat")
    trajectories, _ = rollout(model, encoder, make_env, games[:1], 2, max_new_tokens=8, context_limit=2048)
    contexts, responses = rows_of(trajectories)
    assert len(contexts) == 20
    assert len(pack(contexts, responses)) == 2
    plain = response_logprobs(model, contexts, responses, packed=False)
    packed = response_logprobs(model, contexts, responses)
    assert torch.equal(plain.isnan(), packed.isnan())
    assert (plain - packed).abs().nan_to_num().max() < 1e-4
