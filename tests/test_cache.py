"""The cache that grows in place, against transformers' own."""

import pytest
import torch
from transformers import DynamicCache, GenerationConfig

from lm.cache import RoomyLayer, appended, roomy_cache
from lm.sampler import Sampler

SHAPE = (2, 3, 4)  # rows, heads, size


def states(length: int, start: float = 0.0) -> torch.Tensor:
    rows, heads, size = SHAPE
    return start + torch.arange(rows * heads * length * size).float().view(rows, heads, length, size)


def test_columns_are_written_in_place_while_there_is_room():
    held = appended(torch.tensor([]), states(3), room=2)
    assert torch.equal(held, states(3))
    more = [states(1, start=100.0), states(1, start=200.0), states(1, start=300.0)]
    memory = held.data_ptr()
    for count, new in enumerate(more, 1):
        held = appended(held, new, room=2)
        assert torch.equal(held, torch.cat([states(3), *more[:count]], 2))
        assert (held.data_ptr() == memory) == (count <= 2)


@pytest.mark.parametrize(
    "own",
    [
        states(4),  # no room
        states(4).transpose(1, 2).contiguous().transpose(1, 2),  # columns before heads
        states(8)[:, :, ::2],  # the memory between the columns is somebody's
        states(4)[:1, :1].expand(2, 3, 4, 4),  # one memory for all heads
    ],
)
def test_memory_that_is_laid_out_otherwise_is_left_alone(own):
    before, new = own.clone(), states(2, start=50.0)
    grown = appended(own, new, room=5)
    assert torch.equal(grown, torch.cat([before, new], 2))
    assert torch.equal(own, before)
    grown.zero_()
    assert torch.equal(own, before)


def test_rows_that_stay_have_their_own_memory():
    layer = RoomyLayer(4, None)
    layer.update(states(3), states(3))
    layer.batch_select_indices(torch.tensor([1]))
    layer.update(states(1)[:1], states(1)[:1])
    assert torch.equal(layer.keys, torch.cat([states(3)[1:], states(1)[:1]], 2))


@pytest.mark.parametrize("autocast", [False, True])
def test_generation_is_that_of_transformers_own_cache(llama, autocast):
    ids = torch.tensor([[5, 6, 7, 8], [9, 8, 7, 6]])
    options = GenerationConfig(max_new_tokens=12, min_new_tokens=12, do_sample=False, pad_token_id=0)
    options.return_dict_in_generate = options.output_logits = True
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        caches = [DynamicCache(config=llama.config), roomy_cache(llama, 12)]
        plain, roomy = (llama.generate(ids, generation_config=options, cache=cache) for cache in caches)
    assert torch.equal(torch.stack(plain.logits), torch.stack(roomy.logits))
    for layer, ours in zip(*(cache.layers for cache in caches), strict=True):
        assert type(ours) is RoomyLayer
        assert ours.keys.dtype == (torch.bfloat16 if autocast else torch.float32)
        assert torch.equal(layer.keys.to(ours.keys.dtype), ours.keys)
        assert torch.equal(layer.values, ours.values)


def test_a_turn_copies_what_is_held_once(llama, tokenizer, monkeypatch):
    made = []
    original = torch.Tensor.new_empty
    monkeypatch.setattr(torch.Tensor, "new_empty", lambda self, *size: made.append(size) or original(self, *size))
    Sampler(llama, tokenizer, max_new_tokens=6, temperature=1.0)([0, 1], [[5, 6, 7], [5, 6, 8]])
    layers = llama.config.num_hidden_layers
    assert len(made) == 2 * layers  # keys and values, once a layer, for six tokens
    assert {size[2] for size in made} == {3 + 6}
