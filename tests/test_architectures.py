"""What is sampled is what is scored, on every causal language model of transformers that a tiny configuration builds.

Three episodes of unequal length, one of which ends earlier, are sampled over three turns as a rollout does. The
log-probs of what was sampled, their packed, per-step and branched scores and the training gradients are compared with
one unpadded, uncached pass over each row alone. Windows have 8 or 16 tokens here, and rows grow beyond them.
"""

from types import SimpleNamespace

import pytest
import torch
import transformers
from torch.nn.utils.rnn import pad_sequence

from lm.loading import frozen_copy, without_dropout
from lm.obstacles import check_gap, check_model, logprob_gap
from lm.sampler import Sampler
from lm.scoring import pack, sequence_logprobs
from rescore import response_logprobs, tree_logprobs
from tests.architectures import VOCABULARY, architectures, small_model

NO_FROM_0 = "does not count positions from 0"
REFUSED = {  # what cannot be trained, and the reason that the run stops with
    "CamembertForCausalLM": NO_FROM_0,
    "CpmAntForCausalLM": "what comes after a token changes its log-probs",
    "Data2VecTextForCausalLM": NO_FROM_0,
    "GitForCausalLM": "when sampled and when scored differ",
    "MoshiForCausalLM": "when sampled and when scored differ",
    "RobertaForCausalLM": NO_FROM_0,
    "RobertaPreLayerNormForCausalLM": NO_FROM_0,
    "XLMRobertaForCausalLM": NO_FROM_0,
    "XLMRobertaXLForCausalLM": NO_FROM_0,
    "XLMWithLMHeadModel": "what comes after a token changes its log-probs",
}
OUTER = "a configuration around that of the text model, which is tried"
OTHER = "needs more than a text"
UNTRIED = {  # configurations that no tiny version was found for
    "BltConfig": "bytes in patches: sizes that depend on one another",
    "CohereCompassTextConfig": "its rotary embedding wants a kind of layer that its default does not have",
    "DbrxConfig": "its default configuration lacks a field that its own code reads",
    "DoryConfig": "its own attention mask does not fit beyond the window",
    "Dots3NoteConfig": OUTER,
    "Emu3Config": OUTER,
    "Gemma3nConfig": "its vision part needs a library that is not installed; Gemma3nTextConfig is tried",
    "Gemma4AssistantConfig": OTHER,
    "Gemma4UnifiedAssistantConfig": OTHER,
    "KimiLinearConfig": "equal, but takes half a minute on a CPU",
    "Llama4Config": OUTER,
    "MusicgenConfig": OTHER,
    "MusicgenMelodyConfig": OTHER,
    "ProphetNetConfig": "no number of layers can be set",
    "Qwen3_5Config": OUTER,
    "Qwen3_5MoeConfig": OUTER,
    "Qwen4ExpConfig": OUTER,
    "Qwen4ExpTextConfig": "sizes that depend on one another",
    "ReformerConfig": "sizes that depend on one another",
    "XLNetConfig": "its default configuration lacks a field that its own code reads",
    "XmodConfig": OTHER,
    "ZambaConfig": "sizes that depend on one another",
    "Zamba2Config": "sizes that depend on one another",
    "xLSTMConfig": "sizes that depend on one another",
}
TRIED = [pair for pair in architectures() if pair[0] not in UNTRIED]
TOKENIZER = SimpleNamespace(eos_token_id=4, pad_token_id=0, chat_template=None)
ENDS = list(range(4, VOCABULARY, 6))  # many ends of turn: some responses are short, so that rows have padding inside


def episodes(sampler: Sampler) -> tuple[list[list[int]], list[list[int]]]:
    """Contexts and responses, by episode and turn."""
    generator = torch.Generator().manual_seed(0)
    words = lambda count: torch.randint(5, VOCABULARY, (count,), generator=generator).tolist()
    contexts, steps = [words(5), words(9), words(6)], {}
    for turn in range(3):
        live = [0, 1, 2] if turn < 2 else [0, 2]
        for i, response in zip(live, sampler(live, [contexts[i] for i in live]), strict=True):
            steps[i, turn] = contexts[i], response
            contexts[i] = contexts[i] + response + words(2 + 3 * ((turn + i) % 2))
    return tuple(map(list, zip(*(steps[at] for at in sorted(steps)), strict=True)))


def alone(model, contexts, responses) -> torch.Tensor:
    """log p of each response token in a pass over its own row, NaN beyond a row's end. -> (B, R)"""
    rows = []
    for context, response in zip(contexts, responses, strict=True):
        ids = torch.tensor([context + response])
        logprobs = model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits[0].log_softmax(-1)
        rows.append(logprobs[len(context) - 1 : -1].gather(1, torch.tensor(response)[:, None])[:, 0])
    return pad_sequence(rows, batch_first=True, padding_value=float("nan"))


def gradients(model, logprobs: torch.Tensor) -> list[torch.Tensor]:
    model.zero_grad()
    logprobs[~logprobs.isnan()].square().sum().backward()
    return [p.grad.clone() for p in model.parameters() if p.grad is not None]


def sampled_and_scored(model) -> dict[str, float]:
    """Largest |difference| of each way from each row alone; of gradients as a share of the largest one."""
    model.generation_config.eos_token_id = ENDS
    torch.manual_seed(0)
    # read in pieces of three columns, the others' rows being longer and shorter than that
    sampler = Sampler(model, TOKENIZER, max_new_tokens=4, temperature=1.0, record=True, token_budget=9)
    contexts, responses = episodes(sampler)
    expected = alone(model, contexts, responses)
    truth = expected.detach()
    sampled = [turn for episode in sorted(sampler.recorded) for turn in sampler.recorded[episode]]
    largest_gap, mean_gap = logprob_gap(sampled, truth)
    check_gap(largest_gap, mean_gap, model.dtype)
    branches = [[*c[:2], 50 + i, *c[2:]] if i % 3 else None for i, c in enumerate(contexts)]
    branched = [i for i, branch in enumerate(branches) if branch]
    trunk, branch = tree_logprobs(model, contexts, responses, branches, token_budget=200)
    of_branches = alone(model, [branches[i] for i in branched], [responses[i] for i in branched]).detach()
    differences = {
        "packed": response_logprobs(model, contexts, responses, token_budget=60) - truth,
        "per step": response_logprobs(model, contexts, responses, packed=False, token_budget=60) - truth,
        "trunk": trunk - truth,
        "branch": branch[branched][:, : of_branches.shape[1]] - of_branches,
    }
    assert not (differences["packed"].isnan() ^ truth.isnan()).any()
    largest = {name: difference.abs().nan_to_num().max().item() for name, difference in differences.items()}
    by_row = gradients(model, expected)
    packed = gradients(model.train(), sequence_logprobs(model, pack(contexts, responses), 1.0)[0])
    off = max((a - b).abs().max() for a, b in zip(packed, by_row, strict=True))
    return {"sampled": largest_gap, **largest, "gradient": (off / max(g.abs().max() for g in by_row)).item()}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("config", "name"), TRIED, ids=[f"{name}-{config}" for config, name in TRIED])
def test_sampled_packed_branched_and_trained_are_one(config, name):
    model = without_dropout(small_model(getattr(transformers, config), getattr(transformers, name)))
    if name in REFUSED:
        with pytest.raises(ValueError, match=REFUSED[name]):
            check_model(model, 64)
            sampled_and_scored(model)
        return
    check_model(model, 64)
    differences = sampled_and_scored(model)
    assert max(differences.values()) < 1e-4, differences


def test_the_tables_name_what_exists_and_most_is_tried():
    configs, names = zip(*architectures(), strict=True)
    assert UNTRIED.keys() <= set(configs)
    assert REFUSED.keys() <= set(names)
    assert len(TRIED) >= 150


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("config", "name"), TRIED, ids=[f"{name}-{config}" for config, name in TRIED])
def test_a_frozen_copy_in_less_gives_the_same_numbers_under_autocast(config, name):
    model = without_dropout(small_model(getattr(transformers, config), getattr(transformers, name))).eval()
    ids = torch.randint(5, VOCABULARY, (2, 7), generator=torch.Generator().manual_seed(0))
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        copies = [frozen_copy(model, dtype, mixed_precision="bf16") for dtype in ("float32", "auto")]
        whole, less = (copied(input_ids=ids, use_cache=False).logits for copied in copies)
    assert torch.equal(whole, less)
