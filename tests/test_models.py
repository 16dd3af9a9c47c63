"""Loading and saving: SmolLM2 from its package, LoRA with the adapters off as the reference."""

import copy
from pathlib import Path

import pytest
import torch
import torchgen
import transformers
import yaml
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPT2LMHeadModel

import lm.precision
from config import Config, parse_args
from lm.loading import add_lora, frozen, frozen_copy, save_policy
from lm.obstacles import fuse_norms, fused_norm, plain_norms
from lm.precision import device_of, mixed_precision, multiplies_bfloat16
from lm.processes import clip_gradients
from lm.sampler import Sampler
from lm.scoring import pack, sequence_logprobs, tree_logprobs
from tests.architectures import small_model
from tiny.coldstart import ColdStart
from tiny.loading import load_model
from train import k3, policy_loss


def test_smollm2_is_dense_trainable_and_answers(smollm2):
    model, tokenizer = smollm2
    assert sum(p.numel() for p in model.parameters()) == 134_515_008
    assert all(p.dtype == torch.float32 and p.requires_grad for p in model.parameters())
    question = [{"role": "user", "content": "What is the capital of France?"}]
    ids = tokenizer.apply_chat_template(question, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    out = model.generate(**ids, max_new_tokens=12, do_sample=False)
    assert "Paris" in tokenizer.decode(out[0])


def test_the_tiny_model_comes_in_the_dtype_that_is_asked_for():
    assert load_model("tiny", dtype="bfloat16")[0].dtype == torch.bfloat16
    assert load_model("tiny")[0].dtype == torch.float32


def test_a_saved_policy_loads_plainly(llama, tokenizer, tmp_path):
    save_policy(llama, tokenizer, tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(llama.parameters(), again.parameters(), strict=True))
    text = '{"episode_summary": " done ", "episode_skill": " open it ", "step_skills": { "1": " look "}}'
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert loaded(text)["input_ids"] == tokenizer(text)["input_ids"]
    assert load_model(str(tmp_path))[1].chat_template == tokenizer.chat_template


def test_a_loaded_model_has_no_dropout(tokenizer, tmp_path):
    model = GPT2LMHeadModel(GPT2Config(vocab_size=len(tokenizer), n_embd=8, n_layer=1, n_head=2))
    save_policy(model, tokenizer, tmp_path)
    loaded = load_model(str(tmp_path))[0].train()
    ids = torch.tensor([[5, 6, 7]])
    assert torch.equal(loaded(ids).logits, model.eval()(ids).logits)


def test_rotary_frequencies_stay_exact_in_bfloat16(llama, tokenizer, tmp_path):
    """Rounded they are wrong by 0.4%, which is four positions at the thousandth. `from_pretrained` keeps them, too."""
    save_policy(llama, tokenizer, tmp_path)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    for model in (load_model(str(tmp_path), dtype="bfloat16")[0], frozen(copy.deepcopy(llama), "bfloat16")):
        assert all(p.dtype == torch.bfloat16 for p in model.parameters())
        own, exact = model.model.rotary_emb.inv_freq, llama.model.rotary_emb.inv_freq
        assert own.dtype == torch.float32 and torch.equal(own, exact)
        assert torch.equal(own, plain.model.rotary_emb.inv_freq)
        assert model.state_dict().keys() == llama.state_dict().keys()  # they are no part of what is saved


def test_a_model_without_a_chat_template_is_refused(llama, tokenizer, tmp_path):
    bare = copy.deepcopy(tokenizer)
    bare.chat_template = None
    save_policy(llama, bare, tmp_path)
    with pytest.raises(ValueError, match="chat template"):
        load_model(str(tmp_path))


def test_lora_reference_is_the_start_and_the_merged_policy_is_the_end(llama, tokenizer, tmp_path):
    ids = torch.tensor([tokenizer("<user>look<assistant>")["input_ids"]])
    start = copy.deepcopy(llama)
    model = add_lora(copy.deepcopy(llama), rank=4)
    reference = frozen_copy(model)
    assert 0 < sum(p.numel() for p in model.parameters() if p.requires_grad) < start.num_parameters() / 2
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
        assert torch.allclose(reference(input_ids=ids).logits, start(input_ids=ids).logits, atol=1e-5)
        changed = model(input_ids=ids).logits
        assert not torch.allclose(changed, start(input_ids=ids).logits, atol=1e-2)
        save_policy(model, tokenizer, tmp_path)
        merged = AutoModelForCausalLM.from_pretrained(tmp_path)
        assert torch.allclose(merged(input_ids=ids).logits, changed, atol=1e-3)
    assert reference.device == model.device


# ---- bfloat16 only where the device multiplies in it -----------------------------------------------------------------


@pytest.mark.parametrize("has, chosen", [(True, "bf16"), (False, "no")])
def test_auto_is_what_the_device_multiplies_in(has, chosen, monkeypatch):
    monkeypatch.setattr(lm.precision, "multiplies_bfloat16", lambda kind: has)
    assert mixed_precision("auto") == ColdStart().mixed_precision == chosen
    assert Config(mixed_precision="auto").mixed_precision == chosen
    assert Config(mixed_precision="bf16").mixed_precision == ColdStart(mixed_precision="bf16").mixed_precision == "bf16"


def test_a_processor_without_oneDNN_multiplies_in_float32(monkeypatch):
    assert multiplies_bfloat16("cpu") in (True, False)
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    assert multiplies_bfloat16("cpu") is False


# ---- devices ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("setting", "cuda", "mps", "chosen"),
    [("auto", True, False, "cuda"), ("auto", False, True, "cpu"), ("auto", False, False, "cpu"), ("mps", 0, 1, "mps")],
)
def test_auto_is_a_gpu_of_cuda_or_the_cpu_and_never_apples(setting, cuda, mps, chosen, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)
    assert device_of(setting).type == chosen


def test_a_device_that_is_not_there_is_one_line(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit):
        parse_args(["--device", "cuda"])
    assert "--device cuda: PyTorch finds none on this machine, but cpu" in capsys.readouterr().err


class Operations(TorchDispatchMode):
    """The names of all that PyTorch is asked for, and what there is in float64."""

    def __init__(self):
        super().__init__()
        self.names, self.doubles = set(), set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        if function.namespace == "aten":  # others are the profiler's
            self.names.add(function.name().removeprefix("aten::"))
        tensors = [leaf for leaf in tree_leaves((args, kwargs, out)) if isinstance(leaf, torch.Tensor)]
        self.doubles |= {function.name() for tensor in tensors if tensor.dtype == torch.float64}
        return out


def runs_on_mps(name: str, functions: dict[str, dict]) -> bool:
    """By PyTorch's own list: with a kernel for it, or made of others."""
    function = functions[name]
    if "structured_delegate" in function:
        return runs_on_mps(function["structured_delegate"], functions)
    kinds = {kind.strip() for kinds in function.get("dispatch", {}) for kind in kinds.split(",")}
    return not kinds or any(kind == "MPS" or kind.startswith("Composite") for kind in kinds)


def test_the_core_asks_a_mac_for_nothing_that_it_lacks(llama, tokenizer):
    """Sampling with its cache, scoring packed and as a tree, a pass with gradient, and AdamW's step."""
    listed = Path(torchgen.__file__).parent / "packaged/ATen/native/native_functions.yaml"
    functions = {entry["func"].partition("(")[0]: entry for entry in yaml.safe_load(listed.read_text())}
    assert runs_on_mps("nextafter", functions) and not runs_on_mps("_linalg_eigh", functions)
    optimizer = torch.optim.AdamW(llama.parameters(), lr=1e-3)
    contexts, responses = [[3, 4, 5], [3, 4, 5, 6, 7, 8]], [[6, 7], [9]]
    with Operations() as seen:
        sampler = Sampler(llama, tokenizer, max_new_tokens=4, temperature=1.0, record=True, token_budget=8)
        first = sampler([0, 1], [[3, 4, 5], [3, 4]])
        sampler([1], [[3, 4, *first[1], 5]])
        tree_logprobs(llama, contexts, responses, [None, [3, 4, 5, 6, 7, 9, 8]], token_budget=64)
        logprobs, at = sequence_logprobs(llama, pack(contexts, responses), 1.0)
        losses, _ = policy_loss(logprobs, logprobs.detach(), torch.ones(len(at[0])), 0.2, 3.0)
        (losses + k3(logprobs, logprobs.detach() - 0.1, 10.0)).sum().backward()
        clip_gradients(list(llama.parameters()), 1.0)
        optimizer.step()
    chosen_by_device = {name for name in seen.names if name.startswith("_scaled_dot_product_")}
    assert len(seen.names) > 60 and chosen_by_device
    assert not {name for name in seen.names - chosen_by_device if not runs_on_mps(name, functions)}
    assert not seen.doubles


@pytest.mark.parametrize(
    ("name", "words"),
    [("empty", "holds no model: there is no config.json in it"), ("nowhere", "there is no such folder")],
)
def test_a_folder_that_is_no_model_is_one_line(name, words, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=words) as raised:
        load_model(str(tmp_path / name))
    assert "\n" not in str(raised.value)


def gained(x, weight):
    """Llama's norm, with a weight of another meaning."""
    return (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)) * (1 + weight)


@pytest.mark.parametrize("kind", ["Llama", "Qwen3", "Olmo2", "Gemma2", "DeepseekV3", "GPT2"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fused_norms_change_no_bit_of_logits_and_gradients(kind, dtype, monkeypatch):
    """Nor under autocast. Gemma's and Olmo2's norms compute something else, and stay as they are."""
    head = "LMHeadModel" if kind == "GPT2" else "ForCausalLM"
    made = small_model(*[getattr(transformers, f"{kind}{part}") for part in ("Config", head)]).to(dtype)
    norms = {type(module) for module in made.modules() if type(module).__name__.endswith("RMSNorm")}
    for norm in norms:  # as transformers has them
        if own := plain_norms.pop(norm, None):
            monkeypatch.setattr(norm, "forward", own)
    ids = torch.randint(3, 90, (2, 9))

    def answers():
        found = []
        for enabled in (False, True):
            made.zero_grad()
            with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
                logits = made(input_ids=ids, use_cache=False).logits
            logits.float().square().sum().backward()
            found += [logits.detach(), *(p.grad.clone() for p in made.parameters() if p.grad is not None)]
        return found

    before = answers()
    fuse_norms(made)
    assert all(map(torch.equal, before, answers()))
    assert [norm.forward is fused_norm for norm in norms] == [kind in ("Llama", "Qwen3", "DeepseekV3")] * len(norms)


def test_a_norm_of_its_own_kind_stays_as_it_is():
    class OwnRMSNorm(torch.nn.Module):
        variance_epsilon = 1e-6

        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.zeros(8))

        def forward(self, x):
            return gained(x, self.weight)

    class GatedRMSNorm(OwnRMSNorm):
        def forward(self, x, gate):
            return gained(x, self.weight) * gate

    for norm in (OwnRMSNorm, GatedRMSNorm):
        own = norm.forward
        fuse_norms(torch.nn.Sequential(norm()))
        assert norm.forward is own
