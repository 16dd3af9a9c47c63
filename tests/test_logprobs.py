"""Chunks change no value, no gradient and no model: they only keep fewer logits alive."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import CohereConfig, CohereForCausalLM, Gemma2Config, Gemma2ForCausalLM, LlamaConfig, LlamaForCausalLM

from lm import logprobs
from lm.loading import add_lora, frozen_copy
from lm.logprobs import chunked_logprobs, has_linear_head, sequence_logprobs, token_logprobs
from lm.packing import pack
from rescore import response_logprobs

SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
SIZES |= {"num_key_value_heads": 2, "head_dim": 8, "vocab_size": 97, "pad_token_id": 0, "eos_token_id": 4}


def llama(*, tied: bool):
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(tie_word_embeddings=tied, **SIZES))
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
    model = llama(tied=kind != "untied")
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
    model = llama(tied=True)
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
    model = llama(tied=False)
    with Largest(97) as whole:
        values_and_gradients(token_logprobs, model)
    with Largest(97) as chunked:
        values_and_gradients(chunked_logprobs, model, 97 * 4)
    assert whole.rows == 13
    assert chunked.rows == 4


def test_logits_that_fit_are_held_whole_and_others_in_chunks(monkeypatch):
    model = llama(tied=True)
    with Largest(97) as most:
        whole = token_logprobs(model, *inputs(), 1.0)
    assert most.rows == 13
    monkeypatch.setattr(logprobs, "CHUNK", 97 * 13 - 1)
    has_linear_head(model)  # asked beforehand: it makes logits of its own
    with Largest(97) as most:
        assert torch.allclose(token_logprobs(model, *inputs(), 1.0), whole, atol=1e-5)
    assert most.rows == 12


@pytest.mark.parametrize("kind", ["soft-capped", "scaled"])
def test_a_model_that_changes_its_logits_is_found_out_and_scored_plainly(kind, monkeypatch, caplog):
    torch.manual_seed(0)
    model = {
        "soft-capped": lambda: Gemma2ForCausalLM(Gemma2Config(**SIZES, final_logit_softcapping=30.0)),
        "scaled": lambda: CohereForCausalLM(CohereConfig(**SIZES, logit_scale=0.25)),
    }[kind]().eval()
    monkeypatch.setattr(logprobs, "CHUNK", 1)
    assert not has_linear_head(model)
    assert "held as a whole" in caplog.text
    assert torch.equal(token_logprobs(model, *inputs(), 1.0), token_logprobs(model, *inputs(), 1.0, chunk=10**6))


def test_asking_leaves_the_model_as_it_was():
    model = llama(tied=True).train()
    assert has_linear_head(model)
    assert model.training
    assert not model.model._forward_hooks
    assert all(p.grad is None for p in model.parameters())


def test_a_lora_reference_is_chunked_with_its_adapters_off(monkeypatch):
    start = llama(tied=True).eval()
    rows = [[1, 2, 3], [4, 5]], [[6, 7], [8, 9, 10]]
    expected = response_logprobs(start, *rows, token_budget=64)
    model = add_lora(start, rank=2)
    reference = frozen_copy(model)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
    monkeypatch.setattr(logprobs, "CHUNK", 97 * 2)
    assert has_linear_head(reference)
    assert (response_logprobs(reference, *rows, token_budget=64) - expected).abs().nan_to_num().max() < 1e-5
    assert (response_logprobs(model, *rows, token_budget=64) - expected).abs().nan_to_num().max() > 0.1


def test_training_scores_go_through_chunks(monkeypatch):
    model = llama(tied=True)
    sequences = pack([[1, 2, 3], [1, 2, 3, 6, 7, 5]], [[6, 7], [8, 9, 10]])
    whole, rows, columns = sequence_logprobs(model, sequences, 1.0)
    monkeypatch.setattr(logprobs, "CHUNK", 97 * 2)
    chunked, *where = sequence_logprobs(model, sequences, 1.0)
    assert torch.allclose(whole, chunked, atol=1e-5)
    assert chunked.requires_grad
    assert (rows.tolist(), columns.tolist()) == tuple(w.tolist() for w in where) == ([0, 0, 1, 1, 1], [0, 1, 0, 1, 2])
