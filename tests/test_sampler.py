"""Sampling on unlike architectures: what is kept, what is refused, and whether what was sampled is what is scored."""

import copy
import math

import pytest
import torch
from transformers import (
    BertConfig,
    BertLMHeadModel,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    GenerationConfig,
    GPT2Config,
    GPT2LMHeadModel,
    JambaConfig,
    JambaForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    MptConfig,
    MptForCausalLM,
    Qwen3NextConfig,
    Qwen3NextForCausalLM,
)

from lm import scoring
from lm.encoder import Encoder
from lm.loading import add_lora, frozen_copy, without_dropout
from lm.obstacles import (
    cache_obstacle,
    cached_columns,
    check_gap,
    check_model,
    check_positions,
    logprob_gap,
    padding_obstacle,
    sampling_note,
)
from lm.sampler import Draws, Sampler, end_of_turn_ids
from lm.scoring import pack, sequence_logprobs, tree_obstacle
from rescore import response_logprobs
from tests.architectures import small_model
from tests.test_architectures import ENDS, TOKENIZER, episodes


def played(model, **options):
    """(contexts, responses, the sampler) of three episodes over three turns."""
    model.generation_config.eos_token_id = ENDS
    torch.manual_seed(0)
    sampler = Sampler(model, TOKENIZER, **{"max_new_tokens": 5, "temperature": 1.0} | options)
    return *episodes(sampler), sampler


@pytest.mark.parametrize("kind", ["sliding", "recurrent", "alibi"])
def test_a_cache_that_padding_would_change_is_not_kept_and_tokens_are_the_same(kind):
    model, reason = {
        "sliding": lambda: (small_model(MistralConfig, MistralForCausalLM, sliding_window=8), "padding inside a row"),
        "recurrent": lambda: (small_model(Qwen3NextConfig, Qwen3NextForCausalLM), "linear_attention"),
        "alibi": lambda: (small_model(MptConfig, MptForCausalLM), "padding inside a row"),
    }[kind]()
    assert reason in cache_obstacle(model)
    _, kept, sampler = played(model, reuse_cache=True, temperature=0.0)
    assert sampler.held is None
    assert kept == played(model, reuse_cache=False, temperature=0.0)[1]
    assert "each turn reads its whole context: " + cache_obstacle(model) == sampling_note(model)


def test_a_cache_is_kept_until_a_sliding_window_would_leave_something_out():
    model = small_model(MistralConfig, MistralForCausalLM, sliding_window=30)
    assert cache_obstacle(model) is None
    assert sampling_note(model) == "the cache is kept from turn to turn, up to 29 tokens of a sliding window"
    read = []
    model.register_forward_pre_hook(lambda _, args, inputs: read.append(inputs["input_ids"].shape[1]), with_kwargs=True)
    contexts, kept, sampler = played(model, temperature=0.0)
    first = [width for width in read if width > 1]
    assert first == [9, 6, max(map(len, contexts))]  # the second turn reads what is new alone, the third everything
    assert sampler.held.ids.shape[1] <= 29
    assert played(small_model(MistralConfig, MistralForCausalLM, sliding_window=20))[2].held is None
    assert kept == played(model, reuse_cache=False, temperature=0.0)[1]


def test_full_attention_keeps_its_cache_and_the_flag_switches_it_off():
    model = small_model(LlamaConfig, LlamaForCausalLM)
    assert cache_obstacle(model) is padding_obstacle(model) is None
    assert sampling_note(model) == "the cache is kept from turn to turn"
    assert sampling_note(model, reuse_cache=False) == "each turn reads its whole context: switched off"
    assert played(model)[2].held is not None
    assert played(model, reuse_cache=False)[2].held is None
    assert not model.training


def test_what_padding_does_is_tried_in_the_models_own_precision():
    """Rounding of mixed precision would be taken for a fault."""
    model = small_model(LlamaConfig, LlamaForCausalLM)
    mixed = []
    model.register_forward_pre_hook(lambda *_: mixed.append(torch.is_autocast_enabled("cpu")))
    with torch.autocast("cpu", torch.bfloat16):
        assert cache_obstacle(model) is padding_obstacle(model) is None
        check_model(model, 64)
    assert mixed == [False] * 6


def test_asking_what_padding_does_draws_no_random_number_and_leaves_the_mode():
    model = small_model(GPT2Config, GPT2LMHeadModel).train()
    before = torch.get_rng_state()
    cache_obstacle(model)
    with pytest.raises(ValueError, match="training mode"):
        check_model(model, 64)
    assert torch.equal(torch.get_rng_state(), before)
    assert model.training


def test_the_log_probs_that_a_sampler_records_are_those_that_are_scored():
    model = small_model(LlamaConfig, LlamaForCausalLM)
    contexts, responses, sampler = played(model, temperature=0.7, record=True)
    assert responses == played(model, temperature=0.7)[1]  # recording changes no token
    assert {episode: len(turns) for episode, turns in sampler.recorded.items()} == {0: 3, 1: 2, 2: 3}
    scored = response_logprobs(model, contexts, responses, temperature=0.7, token_budget=60)
    sampled = [turn for episode in sorted(sampler.recorded) for turn in sampler.recorded[episode]]
    assert logprob_gap(sampled, scored)[0] < 1e-5
    assert logprob_gap(sampled, response_logprobs(model, contexts, responses, token_budget=60))[0] > 0.1
    check_gap(*logprob_gap(sampled, scored), torch.float32)


def test_each_rows_own_number_chooses_its_token():
    """p = (0, 1/4, 1/2, 1/4) and, at temperature 1/2, (0, 1/6, 2/3, 1/6): the first token whose sum exceeds u."""
    logits = torch.tensor([[-math.inf, 0, math.log(2), 0]]).repeat(7, 1)
    numbers = torch.tensor([0, 0.2, 0.25, 0.74, 0.75, 0.99, 1 - 2**-24])[:, None]
    ids = torch.zeros(7, 3, dtype=torch.long)
    draws = Draws(1.0, numbers, 3, record=True)
    assert draws(ids, logits).argmax(1).tolist() == [1, 1, 2, 2, 3, 3, 3]
    assert draws.recorded(1) == [pytest.approx([math.log(p)]) for p in (0.25, 0.25, 0.5, 0.5, 0.25, 0.25, 0.25)]
    sharper = Draws(0.5, numbers, 3, record=False)(ids, logits)
    assert sharper.argmax(1).tolist() == [1, 2, 2, 2, 2, 3, 3]
    assert (sharper.softmax(1).max(1).values == 1).all()  # and no other one can be drawn
    assert Draws(0.0, None, 3, record=False)(ids, logits).argmax(1).tolist() == [2] * 7
    assert draws.finite
    draws(ids, logits * math.nan)
    draws(ids, logits)
    assert not draws.finite


def test_weights_that_are_no_number_sample_nothing(llama, tokenizer):
    with torch.no_grad():
        llama.get_output_embeddings().weight[9] = math.nan
    with pytest.raises(FloatingPointError, match="weights are spoilt"):
        Sampler(llama, tokenizer, max_new_tokens=3, temperature=1.0)([0], [[5, 6, 7]])


def test_what_a_row_samples_depends_on_its_seed_episode_and_turn_alone():
    model = small_model(LlamaConfig, LlamaForCausalLM)

    def sampled(keys, turns=1, seed=0):
        torch.manual_seed(seed)
        sampler = Sampler(model, TOKENIZER, max_new_tokens=9, temperature=1.0)
        return [dict(zip(keys, sampler(keys, [[5, 6, 7]] * len(keys)), strict=True)) for _ in range(turns)]

    (together,) = sampled([0, 1, 2, 3])
    for key in together:
        assert sampled([key]) == [{key: together[key]}]
    assert len(set(map(tuple, together.values()))) == 4
    first, second = sampled([0, 1], turns=2)
    assert first[0] != second[0]
    assert sampled([0], seed=1) != [{0: together[0]}]
    before = torch.get_rng_state()
    sampler = Sampler(model, TOKENIZER, max_new_tokens=9, temperature=1.0)
    after = torch.get_rng_state()
    sampler([0], [[5, 6, 7]])
    assert torch.equal(torch.get_rng_state(), after) and not torch.equal(before, after)


def test_samples_follow_the_distribution():
    """4,000 rows' first tokens against the probabilities: no token is off by more than five standard errors."""
    model = small_model(LlamaConfig, LlamaForCausalLM)
    torch.manual_seed(0)
    sampler = Sampler(model, TOKENIZER, max_new_tokens=1, temperature=0.7)
    tokens = torch.tensor([response[0] for response in sampler(list(range(4000)), [[5, 6, 7]] * 4000)])
    with torch.no_grad():
        p = (model(torch.tensor([[5, 6, 7]])).logits[0, -1] / 0.7).softmax(-1)
    share = torch.bincount(tokens, minlength=len(p)) / 4000
    assert ((share - p).abs() < 5 * (p * (1 - p) / 4000).sqrt() + 1e-3).all()


def test_the_gap_by_hand():
    nan = math.nan
    sampled = [[-1.0, -2.0], [-0.5], [-3.0]]
    scored = torch.tensor([[-1.0, -2.5], [-0.75, nan], [-3.0, nan]])
    assert logprob_gap(sampled, scored) == (0.5, 0.1875)  # (0 + 0.5 + 0.25 + 0) / 4
    with pytest.raises(ValueError, match="not the same tokens"):
        logprob_gap([[-1.0, -2.0], [-0.5]], scored)
    with pytest.raises(ValueError, match="not the same tokens"):
        logprob_gap([[-1.0], [-0.5], [-3.0]], scored)
    for dtype, largest, mean, wrong in (
        (torch.float32, 9e-4, 9e-5, False),
        (torch.float32, 2e-3, 9e-5, True),
        (torch.float32, 9e-4, 2e-4, True),
        (torch.bfloat16, 3.0, 0.1, False),
        (torch.bfloat16, 3.0, 0.2, True),
        (torch.float32, nan, nan, True),
    ):
        if wrong:
            with pytest.raises(ValueError, match="--no-reuse-cache"):
                check_gap(largest, mean, dtype)
        else:
            check_gap(largest, mean, dtype)


# ---- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["dynamic", "longrope", "linear"])
def test_a_position_embedding_that_depends_on_the_batch_is_refused_beyond_its_original_length(kind):
    rope = {"rope_type": kind, "rope_theta": 10000.0, "factor": 2.0, "original_max_position_embeddings": 16}
    rope |= {"short_factor": [1.0] * 4, "long_factor": [3.0] * 4} if kind == "longrope" else {}
    length = 64 if kind == "longrope" else 16  # the dynamic one counts from this length, the other from the original
    rope |= {"original_max_position_embeddings": 8} if kind == "dynamic" else {}
    model = small_model(LlamaConfig, LlamaForCausalLM, rope_parameters=rope, max_position_embeddings=length)
    check_model(model, 16)
    assert (tree_obstacle(model) is None) == (kind == "linear")

    def neighbours_matter(length: int) -> float:
        rows = [[5] * 3, [6] * (length - 1)], [[7, 8], [9]]
        alone = response_logprobs(model, *rows, token_budget=1)
        return (response_logprobs(model, *rows, token_budget=1000) - alone).abs().nan_to_num().max().item()

    assert neighbours_matter(16) < 1e-5
    together = neighbours_matter(20)
    if kind == "linear":
        check_model(model, 17)
        assert together < 1e-5
    else:
        assert together > 1e-3
        with pytest.raises(ValueError, match="lower --context-limit to 16"):
            check_model(model, 17)


@pytest.mark.parametrize(
    "config, model", [(GPT2Config, GPT2LMHeadModel), (MptConfig, MptForCausalLM), (BertConfig, BertLMHeadModel)]
)
def test_more_tokens_than_a_model_has_positions_are_refused(config, model):
    model = small_model(config, model)
    check_positions(model, 128)
    with pytest.raises(ValueError, match="it has positions for 128 tokens: --context-limit"):
        check_positions(model, 129)


def test_positions_that_are_computed_have_no_end():
    for config, model in ((LlamaConfig, LlamaForCausalLM), (JambaConfig, JambaForCausalLM)):
        check_positions(small_model(config, model), 10**6)


def test_a_model_that_looks_ahead_is_refused():
    with pytest.raises(ValueError, match="what comes after a token"):
        check_model(small_model(BertConfig, BertLMHeadModel, is_decoder=False), 64)


def test_dropout_and_router_jitter_are_off_in_training():
    """Then pi / pi_old is 1 before the first step, with gradient checkpointing as without."""
    torch.manual_seed(0)
    for config, architecture in ((GPT2Config, GPT2LMHeadModel), (MixtralConfig, MixtralForCausalLM)):
        random = {"router_jitter_noise": 0.3, "attention_dropout": 0.2} if config is MixtralConfig else {}
        model = small_model(config, architecture, **random)
        sequences = pack([[5, 6, 7]], [[8, 9, 10, 11]])
        old = sequence_logprobs(model, sequences, 1.0)[0]
        assert (sequence_logprobs(model.train(), sequences, 1.0)[0] - old).abs().max() > 1e-3
        with pytest.raises(ValueError, match="training mode"):
            check_model(model, 64)
        assert without_dropout(model) is model
        check_model(model, 64)
        for checkpointing in (False, True):
            if checkpointing:
                model.gradient_checkpointing_enable()
            new = sequence_logprobs(model.train(), sequences, 1.0)[0]
            assert (new - old).abs().max() < 1e-6
            new.sum().backward()
        assert model.is_gradient_checkpointing


# ---- configurations within configurations ----------------------------------------------------------------------------


def test_a_nested_configuration_is_read_where_the_text_model_has_it(monkeypatch):
    model = small_model(Gemma3Config, Gemma3ForConditionalGeneration)
    assert not hasattr(model.config, "layer_types")
    assert "sliding_attention" in tree_obstacle(model)
    assert cached_columns(model) == 15
    sequences = pack([[5, 6, 7]], [[8, 9, 10]])
    whole = sequence_logprobs(model, sequences, 1.0)[0]
    chunks = []
    original = scoring.chunked_logprobs
    monkeypatch.setattr(scoring, "CHUNK", 97 * 2)
    monkeypatch.setattr(scoring, "chunked_logprobs", lambda *a: (chunks.append(a[-1]), original(*a))[1])
    assert torch.allclose(sequence_logprobs(model, sequences, 1.0)[0], whole, atol=1e-5)
    assert chunks == [97 * 2]


# ---- what ends a response, and what a model ships --------------------------------------------------------------------


def test_what_the_template_closes_a_turn_with_ends_a_response(llama, tokenizer):
    """A base model whose tokenizer ends a text with another token than its chat template ends a turn with."""
    llama.generation_config.eos_token_id = None
    base = copy.deepcopy(tokenizer)
    base.eos_token = "<pad>"
    assert end_of_turn_ids(llama, base) == sorted(base.convert_tokens_to_ids(["<pad>", "<end>"]))
    base.chat_template = None
    assert end_of_turn_ids(llama, base) == base.convert_tokens_to_ids(["<pad>"])


def test_a_lora_reference_that_samples_first_does_not_leak_the_models_own_sampling(llama, tokenizer):
    plain = copy.deepcopy(llama)
    model = add_lora(llama, rank=2)
    words = list(range(5, len(tokenizer)))
    model.generation_config = GenerationConfig(eos_token_id=4, pad_token_id=0, top_k=1, suppress_tokens=words[9:])
    answers = []
    for sampling in (plain, frozen_copy(model)):
        torch.manual_seed(0)
        sampler = Sampler(sampling, tokenizer, max_new_tokens=8, temperature=1.0)
        answers.append(sampler([0], [Encoder(tokenizer, "chat").context(["look now"], [])]))
    assert answers[0] == answers[1]


def test_a_frozen_copy_in_less_samples_as_it_is_under_autocast(llama, tokenizer):
    contexts = [Encoder(tokenizer, "chat").context([said], []) for said in ("look now", "look now at it")]
    answers = []
    for dtype in ("float32", "auto"):
        copied = frozen_copy(llama, dtype, mixed_precision="bf16")
        assert len({weight.dtype for weight in copied.parameters()}) == (2 if dtype == "auto" else 1)
        torch.manual_seed(0)
        with torch.autocast("cpu", torch.bfloat16):
            sampler = Sampler(copied, tokenizer, max_new_tokens=8, temperature=1.0)
            answers.append((sampler.columns, sampler([0, 1], contexts)))
    assert answers[0] == answers[1]


def test_where_padding_matters_only_rows_of_one_length_share_a_call(monkeypatch):
    model = small_model(LlamaConfig, LlamaForCausalLM)
    contexts = [[9, 8, 7], [5, 6, 7, 8, 9], [7, 7, 9], [4, 9]]
    options = {"max_new_tokens": 4, "temperature": 0.0, "reuse_cache": False, "record": True}
    alone = [Sampler(model, TOKENIZER, **options)([0], [context])[0] for context in contexts]
    sampler, shapes, original = Sampler(model, TOKENIZER, **options), [], model.generate
    monkeypatch.setattr(
        model, "generate", lambda ids, **more: (shapes.append(tuple(ids.shape)), original(ids, **more))[1]
    )
    sampler.pads = False
    assert sampler([3, 4, 5, 6], contexts) == alone
    assert shapes == [(1, 2), (2, 3), (1, 5)]  # the shortest first
    assert {key: len(turns[0]) for key, turns in sampler.recorded.items()} == {
        key: len(response) for key, response in zip([3, 4, 5, 6], alone, strict=True)
    }
