"""Log-probs of responses: hand-made numbers, the shift, packing, branches and chunks that change no number."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (
    CohereConfig,
    CohereForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GemmaConfig,
    GemmaForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
)

from data import Skills
from envs.alfworld import AlfworldEnv
from lm import scoring
from lm.encoder import Encoder
from lm.loading import add_lora, frozen_copy
from lm.scoring import (
    Sequence,
    chunked_logprobs,
    graft,
    has_linear_head,
    layout_noise,
    micro_batches,
    pack,
    response_logprobs,
    sequence_logprobs,
    token_logprobs,
    tree_attention,
    tree_inputs,
    tree_logprobs,
    tree_obstacle,
)
from rescore import skill_contexts
from router import route
from tests.playing import BUDGET, play, skill_logprobs

NAN = float("nan")


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
    got = response_logprobs(model, [[0, 4, 2]], [[3, 1]], token_budget=BUDGET)
    assert torch.allclose(got, torch.stack([expected[2, 3], expected[3, 1]])[None])


def test_temperature_divides_the_logits():
    model = Bigram()
    expected = (model.table / 0.5).log_softmax(-1)[2, 3]
    assert torch.allclose(response_logprobs(model, [[2]], [[3]], temperature=0.5, token_budget=BUDGET)[0, 0], expected)


def test_short_rows_end_in_nan():
    got = response_logprobs(Bigram(), [[0], [1, 2]], [[1], [2, 3, 4]], token_budget=BUDGET)
    assert got.isnan().tolist() == [[False, True, True], [False, False, False]]


def test_gradient_flows_to_the_right_row():
    model = Bigram()
    logprobs, (rows, columns) = sequence_logprobs(model, pack([[0], [4]], [[1], [2]]), 1.0)
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


@settings(max_examples=60)
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
    def play_some(model, style="chat"):
        torch.manual_seed(0)
        encoder = Encoder(tokenizer, style)
        return encoder, play(model, encoder, compact_env, games[:3], 2, max_new_tokens=6, context_limit=512)[0]

    return play_some


def rows_of(trajectories):
    steps = [step for trajectory in trajectories for step in trajectory.steps]
    return [step.context for step in steps], [step.response for step in steps]


@pytest.mark.parametrize("architecture", ["llama", "qwen"])
def test_packed_equals_plain_on_rollouts(architecture, played, request):
    model = request.getfixturevalue(architecture)
    _, trajectories = played(model)
    contexts, responses = rows_of(trajectories)
    assert len(pack(contexts, responses)) == len(trajectories) < len(contexts)
    plain = response_logprobs(model, contexts, responses, packed=False, token_budget=BUDGET)
    packed = response_logprobs(model, contexts, responses, token_budget=BUDGET)
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


# ---- branches of one pass -------------------------------------------------------------------------------------------

SIZES = {"hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
SIZES |= {"num_key_value_heads": 2, "head_dim": 16}


def test_graft_hangs_a_branch_where_the_contexts_part():
    #  row 0: [1 2] -> [3]   row 1: [1 2 3 7] -> [4 5], and with a skill [1 2 3 8 9 7] -> [4 5]
    (tree,) = graft(pack([[1, 2], [1, 2, 3, 7]], [[3], [4, 5]]), [None, [1, 2, 3, 8, 9, 7]], [[3], [4, 5]], 100)
    assert tree.ids == [1, 2, 3, 7, 4, 5, 8, 9, 7, 4, 5]
    assert tree.trunk == [1, 2, 3, 7, 4, 5]
    assert tree.branches == [(3, 6, 5)]
    assert tree.responses == [(0, 2, 1), (1, 4, 2), (3, 9, 2)]
    inputs = tree_inputs([tree], 12, "cpu")
    assert inputs["position_ids"].tolist() == [[0, 1, 2, 3, 4, 5, 3, 4, 5, 6, 7, 0]]
    assert inputs["attention_mask"].shape == (1, 1, 6, 12)  # the trunk needs none
    seen = inputs["attention_mask"][0, 0].int().tolist()
    assert seen[1] == [1, 1, 1, 0, 0, 0, 1, 1, 0, 0, 0, 0]  # a branch: the trunk up to its point, itself up to here
    assert seen[4] == [1, 1, 1, 0, 0, 0, 1, 1, 1, 1, 1, 0]
    longer = Sequence([1] * 9, [], [])
    seen = tree_inputs([longer, tree], 12, "cpu")["attention_mask"][:, 0].int().tolist()
    assert seen[1][1] == [1, 1, 1, 0, 0, 0, 1, 1, 0, 0, 0, 0]
    assert seen[0][2] == [1, 1, 1, 1, 1, 1, 1, 1, 1, 0, 0, 0]  # the shortest trunk decides where masks begin


@pytest.mark.parametrize(
    ("contexts", "branches", "budget"),
    [
        ([[1, 2], [1, 2, 3, 7]], [None, [9, 2, 3, 7]], 100),  # nothing shared
        ([[1, 2], [1, 2, 3, 7]], [None, [1, 2, 3, 8, 7]], 9),  # too long for the budget
        ([[1, 2], [4, 2, 3, 7]], [None, [4, 2, 3, 8, 7]], 100),  # a row packed with no other
    ],
)
def test_a_context_that_cannot_be_a_branch_is_a_sequence_of_its_own(contexts, branches, budget):
    trees = graft(pack(contexts, [[3], [4, 5]]), branches, [[3], [4, 5]], budget)
    assert not any(tree.branches for tree in trees)
    assert trees[-1].ids == branches[1] + [4, 5]
    assert trees[-1].responses == [(3, len(branches[1]), 2)]


def test_branches_leave_the_packed_sequences_as_they_were():
    sequences = pack([[1, 2], [1, 2, 3, 7]], [[3], [4]])
    graft(sequences, [[1, 5, 2], None], [[3], [4]], 100)
    assert sequences == pack([[1, 2], [1, 2, 3, 7]], [[3], [4]])


def guided_rollouts(model, played, mode, style="chat"):
    """(contexts, responses, step-guided contexts, what skill_logprobs needs); three step skills a rollout."""
    encoder, trajectories = played(model, style)
    skills = [Skills("s", "open every closed place", {0: "look", 1: "take apple", 3: "go to bed"})] * len(trajectories)
    routes = [route(t, s, mode) for s, t in zip(skills, trajectories, strict=True)]
    branches, _ = skill_contexts(encoder, trajectories, routes, "step", 512)
    return *rows_of(trajectories), branches, (encoder, trajectories, routes)


def assert_same(a, b, tolerance=1e-4):
    assert torch.equal(a.isnan(), b.isnan())
    assert (a - b).abs().nan_to_num().max() < tolerance


@pytest.mark.parametrize("style", ["chat", "window"])
@pytest.mark.parametrize("mode", ["critical-first", "additive"])
@pytest.mark.parametrize("architecture", ["llama", "qwen", "qwen3"])
def test_tree_equals_plain(architecture, mode, style, played, request):
    model = request.getfixturevalue(architecture)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(std=0.3)
    contexts, responses, branches, routed = guided_rollouts(model, played, mode, style)
    old = response_logprobs(model, contexts, responses, packed=False, token_budget=BUDGET)
    step, _ = skill_logprobs(model, *routed, "step", context_limit=512, packed=False)
    trees = graft(pack(contexts, responses), branches, responses, 2048)
    assert sum(len(tree.branches) for tree in trees) == (3 * 6 if style == "chat" else 0)
    plain, branch = tree_logprobs(model, contexts, responses, branches, token_budget=2048)
    assert_same(plain, old)
    assert_same(branch, step)
    assert (branch - plain).abs().nan_to_num().max() > 0.01  # and a skill shifts something
    without, only = tree_logprobs(model, contexts, responses, branches, token_budget=2048, branches_only=True)
    assert without.isnan().all()
    assert_same(only, step)


def test_a_branch_cannot_be_seen_by_the_trunk_or_by_another(llama, played):
    contexts, responses, branches, _ = guided_rollouts(llama, played, "step")
    plain, branch = tree_logprobs(llama, contexts, responses, branches, token_budget=2048)
    changed = [c and [*c[:-3], (c[-3] + 1) % 50, *c[-2:]] if row % 5 == 1 else c for row, c in enumerate(branches)]
    plain_2, branch_2 = tree_logprobs(llama, contexts, responses, changed, token_budget=2048)
    assert_same(plain, plain_2, 1e-6)
    moved = (branch - branch_2).abs().nan_to_num().amax(1) > 1e-6
    assert [row % 5 for row in moved.nonzero().flatten().tolist()] == [1] * 6


@settings(max_examples=40)
@given(st.data(), st.lists(st.tuples(tokens, tokens), min_size=1, max_size=4), st.integers(1, 60))
def test_any_tree_scores_what_its_rows_score_alone(data, turns, budget):
    contexts, responses, branches, history = [], [], [], []
    for chunk, response in turns:
        contexts.append(history + chunk)
        responses.append(response)
        kept, skill = data.draw(st.integers(0, len(history))), data.draw(st.none() | tokens)
        branches.append(skill and history[:kept] + skill + chunk)
        history = history + chunk + response
    trees = graft(pack(contexts, responses), branches, responses, budget)
    scored = sorted((row, tuple(t.ids[a : a + n])) for t in trees for row, a, n in t.responses)
    rows = [*range(len(turns)), *(len(turns) + row for row, context in enumerate(branches) if context)]
    assert scored == [(row, tuple(responses[row % len(turns)])) for row in rows]
    for tree in trees:  # what a branch sees of the trunk, and itself, is its context and response
        for (point, start, size), (row, first, length) in zip(tree.branches, tree.responses[-len(tree.branches) :]):
            context = branches[row - len(turns)]
            assert tree.ids[:point] + tree.ids[start : start + size] == context + responses[row - len(turns)]
            assert (first, length) == (start + size - length, len(responses[row - len(turns)]))


def test_lora_reference_scores_branches_with_the_adapters_off(llama, played):
    contexts, responses, branches, _ = guided_rollouts(llama, played, "step")
    expected = tree_logprobs(llama, contexts, responses, branches, token_budget=BUDGET)
    model = add_lora(llama, rank=4)
    reference = frozen_copy(model)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    assert tree_obstacle(reference) is None
    for got, want in zip(
        tree_logprobs(reference, contexts, responses, branches, token_budget=BUDGET), expected, strict=True
    ):
        assert_same(got, want)
    assert (
        tree_logprobs(model, contexts, responses, branches, token_budget=BUDGET)[1] - expected[1]
    ).abs().nan_to_num().max() > 1e-2


def test_step_skills_cost_branches_not_contexts(llama, played, monkeypatch):
    """Tokens read for both contexts of each step, against those of a second context for each."""
    contexts, responses, branches, _ = guided_rollouts(llama, played, "step")
    read = []

    def progress(batches, name):
        read.append(sum(len(sequence.ids) for batch in batches for sequence in batch))
        return batches

    monkeypatch.setattr(scoring, "progress", progress)
    tree_logprobs(llama, contexts, responses, branches, token_budget=BUDGET)
    response_logprobs(llama, contexts, responses, token_budget=BUDGET)
    response_logprobs(llama, branches, responses, token_budget=BUDGET)
    both, plain, second = read
    assert both < plain + second / 2


def test_only_a_pass_with_branches_changes_how_a_model_attends(llama):
    ids = torch.arange(5)[None]
    with torch.no_grad():
        before = llama(input_ids=ids).logits
        with pytest.raises(ValueError, match="inside"), tree_attention(llama):
            assert llama.config._attn_implementation == "opid_tree"
            assert (llama(input_ids=ids).logits - before).abs().max() < 1e-6  # plainly causal where there is no mask
            raise ValueError("inside")
    assert llama.config._attn_implementation == "sdpa"
    llama._supports_attention_backend = False
    assert "AttentionInterface" in tree_obstacle(llama)


def other_models(vocabulary):
    return {
        "sliding": MistralForCausalLM(MistralConfig(vocab_size=vocabulary, sliding_window=8, **SIZES)),
        "recurrent": MambaForCausalLM(MambaConfig(vocab_size=vocabulary, hidden_size=48, num_hidden_layers=1)),
        "eager": GemmaForCausalLM(GemmaConfig(vocab_size=vocabulary, **SIZES, attn_implementation="eager")),
    }


@pytest.mark.parametrize("kind", ["sliding", "recurrent", "eager"])
def test_a_model_that_takes_no_tree_scores_plainly_and_says_so(kind, llama, played, tokenizer, caplog):
    contexts, responses, branches, routed = guided_rollouts(llama, played, "step")
    torch.manual_seed(0)
    model = other_models(len(tokenizer))[kind].eval()
    scoring.notice.cache_clear()
    plain, branch = tree_logprobs(model, contexts, responses, branches, token_budget=BUDGET)
    assert f"{type(model).__name__} scores each step skill in a pass of its own" in caplog.text
    assert_same(plain, response_logprobs(model, contexts, responses, packed=False, token_budget=BUDGET))
    assert_same(branch, skill_logprobs(model, *routed, "step", context_limit=512, packed=False)[0])


def test_without_branches_the_pass_is_the_packed_one_bit_for_bit(llama, played):
    _, trajectories = played(llama)
    contexts, responses = rows_of(trajectories)
    plain, branch = tree_logprobs(llama, contexts, responses, [None] * len(contexts), token_budget=BUDGET)
    assert torch.equal(
        plain.nan_to_num(), response_logprobs(llama, contexts, responses, token_budget=BUDGET).nan_to_num()
    )
    assert branch.isnan().all()


def test_the_noise_floor_is_tiny_in_float32_and_larger_in_bfloat16(llama, played):
    contexts, responses = rows_of(played(llama)[1])
    fine = layout_noise(llama, contexts, responses, temperature=1.0, token_budget=BUDGET)
    coarse = layout_noise(llama.bfloat16(), contexts, responses, temperature=1.0, token_budget=BUDGET)
    assert 0 < fine < 1e-4 < coarse < 1


def test_the_noise_floor_compares_two_layouts_at_the_runs_temperature(monkeypatch):
    """Two rows of scores that differ by 0.1, 0.3 and 0.2, and where nothing is scored."""
    asked = []

    def scores(model, contexts, responses, *, temperature, token_budget, packed=True):
        asked.append((temperature, packed))
        return torch.tensor([[-1.0, -2.0], [-1.0, NAN]]) if packed else torch.tensor([[-1.1, -2.3], [-1.2, NAN]])

    monkeypatch.setattr("lm.scoring.response_logprobs", scores)
    assert layout_noise(None, [], [], temperature=0.7, token_budget=64) == pytest.approx(0.2)
    assert asked == [(0.7, True), (0.7, False)]


def test_smollm2_packed_equals_plain_over_ten_turns(smollm2, games):
    """The real model, float32, trajectories of 10 turns: to 1e-4. (lab/benchmarks/score.py times it.)"""
    model, tokenizer = smollm2
    torch.manual_seed(0)
    make_env = lambda: AlfworldEnv(prompt="compact", max_steps=10)
    encoder = Encoder(tokenizer, "chat")
    trajectories, _ = play(model, encoder, make_env, games[:1], 2, max_new_tokens=8, context_limit=2048)
    contexts, responses = rows_of(trajectories)
    assert len(contexts) == 20
    assert len(pack(contexts, responses)) == 2
    plain = response_logprobs(model, contexts, responses, packed=False, token_budget=BUDGET)
    packed = response_logprobs(model, contexts, responses, token_budget=BUDGET)
    assert torch.equal(plain.isnan(), packed.isnan())
    assert (plain - packed).abs().nan_to_num().max() < 1e-4


# ---- chunks: fewer logits alive -------------------------------------------------------------------------------------

NARROW = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
NARROW |= {"num_key_value_heads": 2, "head_dim": 8, "vocab_size": 97, "pad_token_id": 0, "eos_token_id": 4}


def narrow(*, tied: bool):
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(tie_word_embeddings=tied, **NARROW))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(5)
    return model


def inputs():
    """Three sequences of 11 tokens; 13 positions whose next token is scored."""
    torch.manual_seed(1)
    ids = torch.randint(0, 97, (3, 11))
    keep = torch.zeros(3, 11, dtype=torch.bool)
    keep[0, 2:7] = keep[1, 4:10] = keep[2, 1:3] = True
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}, keep, torch.randint(0, 97, (13,))


def values_and_gradients(score, model, *more):
    model.zero_grad()
    logprobs = score(model, *inputs(), 0.7, *more)
    (logprobs * torch.linspace(-1, 1, len(logprobs))).sum().backward()
    return logprobs.detach(), {name: p.grad for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("kind", ["tied", "untied", "lora", "checkpointed"])
@pytest.mark.parametrize("chunk", [1, 97 * 3, 97 * 100])
def test_chunked_equals_whole_in_values_and_gradients(kind, chunk):
    model = narrow(tied=kind != "untied")
    if kind == "lora":
        model = add_lora(model, rank=2)
        torch.nn.init.normal_(next(p for name, p in model.named_parameters() if "lora_B" in name))
    if kind == "checkpointed":
        model.gradient_checkpointing_enable()
        model.train()
    expected, gradients = values_and_gradients(token_logprobs, model)
    got, chunked = values_and_gradients(chunked_logprobs, model, chunk)
    assert (got - expected).abs().max() < 1e-5
    assert gradients.keys() == chunked.keys()
    for name, gradient in gradients.items():
        assert (chunked[name] - gradient).abs().max() < 1e-5 * max(1.0, gradient.abs().max().item()), name
    assert any(gradient.abs().max() > 0.1 for gradient in gradients.values())


def test_under_autocast_the_numbers_are_those_of_autocast():
    model = narrow(tied=True)
    with torch.autocast("cpu", torch.bfloat16):
        expected, gradients = values_and_gradients(token_logprobs, model)
        got, chunked = values_and_gradients(chunked_logprobs, model, 97 * 4)
    assert (got - expected).abs().max() < 1e-5
    for name, gradient in gradients.items():  # sums over chunks round differently in bfloat16
        assert (chunked[name] - gradient).norm() < 0.02 * gradient.norm(), name


class Largest(TorchDispatchMode):
    """Notes the most rows of any tensor with `width` columns that an operation makes, weights (32 rows) left out."""

    def __init__(self, width):
        super().__init__()
        self.width, self.rows = width, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else (out,):
            shape = tensor.shape if isinstance(tensor, torch.Tensor) else ()
            if len(shape) > 1 and shape[-1] == self.width and shape != (32, self.width):
                self.rows = max(self.rows, tensor.numel() // self.width)
        return out


def test_no_more_logits_than_a_chunk_exist_in_either_pass():
    model = narrow(tied=False)
    with Largest(97) as whole:
        values_and_gradients(token_logprobs, model)
    with Largest(97) as chunked:
        values_and_gradients(chunked_logprobs, model, 97 * 4)
    assert whole.rows == 13
    assert chunked.rows == 4


def test_logits_that_fit_are_held_whole_and_others_in_chunks(monkeypatch):
    model = narrow(tied=True)
    with Largest(97) as most:
        whole = token_logprobs(model, *inputs(), 1.0)
    assert most.rows == 13
    monkeypatch.setattr(scoring, "CHUNK", 97 * 13 - 1)
    has_linear_head(model)  # asked beforehand: it makes logits of its own
    with Largest(97) as most:
        assert torch.allclose(token_logprobs(model, *inputs(), 1.0), whole, atol=1e-5)
    assert most.rows == 12


@pytest.mark.parametrize("kind", ["soft-capped", "scaled"])
def test_a_model_that_changes_its_logits_is_found_out_and_scored_plainly(kind, monkeypatch, caplog):
    torch.manual_seed(0)
    model = {
        "soft-capped": lambda: Gemma2ForCausalLM(Gemma2Config(**NARROW, final_logit_softcapping=30.0)),
        "scaled": lambda: CohereForCausalLM(CohereConfig(**NARROW, logit_scale=0.25)),
    }[kind]().eval()
    monkeypatch.setattr(scoring, "CHUNK", 1)
    assert not has_linear_head(model)
    assert "held as a whole" in caplog.text
    assert torch.equal(token_logprobs(model, *inputs(), 1.0), token_logprobs(model, *inputs(), 1.0, chunk=10**6))


def test_asking_leaves_the_model_as_it_was():
    model = narrow(tied=True).train()
    assert has_linear_head(model)
    assert model.training
    assert not model.model._forward_hooks
    assert all(p.grad is None for p in model.parameters())


def test_a_lora_reference_is_chunked_with_its_adapters_off(monkeypatch):
    start = narrow(tied=True).eval()
    rows = [[1, 2, 3], [4, 5]], [[6, 7], [8, 9, 10]]
    expected = response_logprobs(start, *rows, token_budget=64)
    model = add_lora(start, rank=2)
    reference = frozen_copy(model)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
    monkeypatch.setattr(scoring, "CHUNK", 97 * 2)
    assert has_linear_head(reference)
    assert (response_logprobs(reference, *rows, token_budget=64) - expected).abs().nan_to_num().max() < 1e-5
    assert (response_logprobs(model, *rows, token_budget=64) - expected).abs().nan_to_num().max() > 0.1


def test_training_scores_go_through_chunks(monkeypatch):
    model = narrow(tied=True)
    sequences = pack([[1, 2, 3], [1, 2, 3, 6, 7, 5]], [[6, 7], [8, 9, 10]])
    whole, at = sequence_logprobs(model, sequences, 1.0)
    monkeypatch.setattr(scoring, "CHUNK", 97 * 2)
    chunked, where = sequence_logprobs(model, sequences, 1.0)
    assert torch.allclose(whole, chunked, atol=1e-5)
    assert chunked.requires_grad
    assert [part.tolist() for part in at] == [part.tolist() for part in where] == [[0, 0, 1, 1, 1], [0, 1, 0, 1, 2]]
