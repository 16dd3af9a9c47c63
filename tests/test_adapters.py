"""LoRA adapters: a folder of them as a model, what a LoRA run saves, which weights it leaves out."""

import copy
import json
import re
import shutil

import pytest
import torch
import transformers
from peft import LoraConfig, PeftModel, PromptTuningConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, GenerationConfig, LlamaConfig, LlamaForCausalLM

import lm.adapters
from config import settings_to_save
from lm.adapters import base_of, left_out, merged_copy
from lm.loading import about_policy, add_lora, rounded, save_policy, without_dropout
from lm.obstacles import check_model, untrained_positions
from lm.sampler import Sampler
from runlog.start import start
from tests.architectures import small_model
from tests.settings import laptop
from tiny.loading import load_config, load_model
from variants.opd import load_teacher

IDS = torch.tensor([[7, 21, 9, 33, 12, 40]])
LINEAR = {"r": 4, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}


@torch.no_grad()
def logits(model) -> torch.Tensor:
    model.eval()  # what it returns is, of an AdapterOff, the model with adapters on
    return model(input_ids=IDS, use_cache=False).logits


@torch.no_grad()
def stirred(model, scale: float = 0.1):
    """Adapters as training would leave them: nothing of them is 0."""
    torch.manual_seed(1)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.add_(torch.randn_like(parameter) * scale)
    return model


@pytest.mark.parametrize("name", ["tiny", "smollm2"])
def test_no_hub_is_asked_about_models_that_come_from_none(name, monkeypatch):
    """Without a network the question took half a minute."""
    monkeypatch.setattr(lm.adapters, "find_adapter_config_file", lambda name: pytest.fail(f"a hub is asked for {name}"))
    assert base_of(name) is None


def adapters_of(model, tokenizer, folder, config) -> torch.Tensor:
    """The base in folder/base, its adapters in folder/adapters -> what the two compute together."""
    save_policy(model, tokenizer, folder / "base")
    base = AutoModelForCausalLM.from_pretrained(folder / "base")
    adapted = stirred(get_peft_model(base, config))
    adapted.save_pretrained(folder / "adapters")
    return logits(adapted)


@pytest.fixture
def given(llama, tokenizer, tmp_path):
    """(base alone, base with adapters): logits, of the two folders."""
    return logits(llama), adapters_of(llama, tokenizer, tmp_path, LoraConfig(**LINEAR))


# ---- read ------------------------------------------------------------------------------------------------------------

KINDS = {
    "plain": LINEAR,
    "rslora": LINEAR | {"use_rslora": True},
    "dora": LINEAR | {"use_dora": True},
    "biases": LINEAR | {"bias": "all"},
    "whole modules": LINEAR | {"modules_to_save": ["lm_head"]},
    "embeddings": LINEAR | {"target_modules": ["q_proj", "embed_tokens"]},
    "head": LINEAR | {"target_modules": ["q_proj", "lm_head"]},
    "single tokens": LINEAR | {"trainable_token_indices": [7, 9]},
    "svd": LINEAR | {"init_lora_weights": "pissa"},
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_a_folder_of_adapters_is_its_base_with_them(kind, tied, llama, qwen, tokenizer, tmp_path):
    expected = adapters_of(qwen if tied else llama, tokenizer, tmp_path, LoraConfig(**KINDS[kind]))
    model, own = load_model(str(tmp_path / "adapters"))
    assert torch.allclose(logits(model), expected, atol=1e-4)
    assert all(p.requires_grad and p.dtype == torch.float32 for p in model.parameters())
    assert own.get_vocab() == tokenizer.get_vocab()
    save_policy(model, own, tmp_path / "again")
    assert torch.allclose(logits(load_model(str(tmp_path / "again"))[0]), expected, atol=1e-4)


def test_adapters_are_merged_in_float32_before_they_are_rounded(given, tmp_path):
    exact, half = (load_model(str(tmp_path / "adapters"), dtype=dtype)[0] for dtype in ("float32", "bfloat16"))
    assert all(torch.equal(a.bfloat16(), b) for a, b in zip(exact.parameters(), half.parameters(), strict=True))


def test_the_base_may_be_sharded_beside_its_adapters_or_have_adapters_itself(given, tmp_path):
    _, expected = given
    model, tokenizer = load_model(str(tmp_path / "base"))
    shutil.rmtree(tmp_path / "base")
    model.save_pretrained(tmp_path / "adapters" / "base", max_shard_size="50KB")
    tokenizer.save_pretrained(tmp_path / "adapters" / "base")
    assert (tmp_path / "adapters" / "base" / "model.safetensors.index.json").exists()
    named(tmp_path / "adapters", "base")
    model = load_model(str(tmp_path / "adapters"))[0]
    assert torch.allclose(logits(model), expected, atol=1e-4)
    second = stirred(add_lora(model, 2))
    second.save_pretrained(tmp_path / "second")
    assert json.loads((tmp_path / "second" / "adapter_config.json").read_text())["base_model_name_or_path"] == str(
        tmp_path / "adapters"
    )
    assert torch.allclose(logits(load_model(str(tmp_path / "second"))[0]), logits(second), atol=1e-4)


def test_adapters_of_more_tokens_make_room_for_them(llama, tokenizer, tmp_path):
    save_policy(llama, tokenizer, tmp_path / "base")
    more = copy.deepcopy(tokenizer)
    more.add_tokens(["quux", "frob"])
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    base.resize_token_embeddings(len(more))
    adapted = stirred(get_peft_model(base, LoraConfig(**LINEAR, modules_to_save=["embed_tokens", "lm_head"])))
    adapted.save_pretrained(tmp_path / "adapters")
    more.save_pretrained(tmp_path / "adapters")
    model, own = load_model(str(tmp_path / "adapters"))
    assert len(own) == len(more) == len(model.get_input_embeddings().weight)
    assert torch.allclose(logits(model), logits(adapted), atol=1e-4)


def named(folder, base, **others) -> None:
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": base} | others))


def of_another_size(folder, tokenizer) -> None:
    save_policy(small_llama(tokenizer), tokenizer, folder / "base")


def small_llama(tokenizer, width: int = 32, **own) -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {"hidden_size": width, "intermediate_size": width, "num_hidden_layers": 1, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **sizes, **own))


def half_of_them(folder, tokenizer) -> None:
    file = folder / "adapters" / "adapter_model.safetensors"
    save_file({name: weight for name, weight in load_file(file).items() if ".layers.0." in name}, file)


def prompts(folder, tokenizer) -> None:
    base = AutoModelForCausalLM.from_pretrained(folder / "base")
    get_peft_model(base, PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)).save_pretrained(
        folder / "adapters"
    )


def packed(folder, tokenizer) -> None:
    file = folder / "base" / "config.json"
    file.write_text(
        json.dumps(json.loads(file.read_text()) | {"quantization_config": {"quant_method": "bitsandbytes"}})
    )


def broken(folder, tokenizer) -> None:
    file = folder / "adapters" / "adapter_model.safetensors"
    save_file({name: weight * float("nan") for name, weight in load_file(file).items()}, file)


WRONG = {
    "holds adapters of nowhere/at-all: no model": lambda folder, _: named(folder / "adapters", "nowhere/at-all"),
    "name no base": lambda folder, _: named(folder / "adapters", None),
    "name themselves": lambda folder, _: named(folder / "adapters", str(folder / "adapters")),
    "adapters of revision v2 of a/b": lambda folder, _: named(folder / "adapters", "a/b", revision="v2"),
    "size mismatch": of_another_size,
    "weights are in one of the two alone": half_of_them,
    "part of the prompt": prompts,
    "keep one of the two": lambda folder, _: shutil.copy(folder / "base" / "model.safetensors", folder / "adapters"),
    "adapters themselves are missing": lambda folder, _: (folder / "adapters" / "adapter_model.safetensors").unlink(),
    "quantised .bitsandbytes.": packed,
    "NaN": broken,
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("words", WRONG)
def test_adapters_that_cannot_be_read_are_one_line(words, given, tokenizer, tmp_path):
    WRONG[words](tmp_path, tokenizer)
    with pytest.raises(ValueError, match=words) as raised:
        load_model(str(tmp_path / "adapters"))
    assert "\n" not in str(raised.value)


# ---- trained ---------------------------------------------------------------------------------------------------------


def of_run(tmp_path, **changes):
    settings = {"tasks": 2, "rollouts": 2, "eval_every": 0, "train_games": 4, "eval_games": 2, "save_every": 1}
    return start(laptop(model=str(tmp_path / "adapters"), out=str(tmp_path / "run"), **settings, **changes))


def test_the_reference_of_a_lora_run_is_what_was_given(given, tmp_path, capsys):
    base, expected = given
    run = of_run(tmp_path, lora_rank=2, kl=0.01)
    told = [line for line in capsys.readouterr().out.splitlines() if "holds adapters of" in line]
    assert len(told) == 1 and told[0].endswith("the reference (adapters off) is what was given, not the base")
    stirred(run.policy, 0.3)
    reference = logits(run.models["reference"])
    assert torch.allclose(reference, expected, atol=1e-4) and not torch.allclose(reference, base, atol=1e-2)
    assert not torch.allclose(logits(run.policy), expected, atol=1e-2)
    run.log.finish(run.policy, run.tokenizer)
    saved = tmp_path / "run" / "policy"
    for folder in (saved, saved / "adapters"):
        assert torch.allclose(logits(load_model(str(folder))[0]), logits(run.policy), atol=1e-4)
    assert about_policy(saved / "adapters") == about_policy(saved) != {}


def test_without_a_rank_given_adapters_are_trained_with_all_weights(given, tmp_path, capsys):
    run = of_run(tmp_path)
    assert "merged into it in float32; all weights are trained" in capsys.readouterr().out
    assert torch.allclose(logits(run.policy), given[1], atol=1e-4)
    assert sum(p.numel() for p in run.trained) == run.policy.num_parameters()


def test_a_teacher_and_a_plan_take_adapters_too(given, tokenizer, tmp_path):
    folder = str(tmp_path / "adapters")
    assert torch.allclose(logits(load_teacher(folder, tokenizer, env="alfworld", dtype="float32")), given[1], atol=1e-4)
    assert load_config(folder).hidden_size == load_config(str(tmp_path / "base")).hidden_size


# ---- saved -----------------------------------------------------------------------------------------------------------


def test_a_policy_in_bfloat16_is_saved_as_it_was_trained(llama, tokenizer, tmp_path):
    """A short run changes weights by less than bfloat16 keeps; the merged weights have to show it all the same."""
    save_policy(llama, tokenizer, tmp_path / "base")
    half = load_model(str(tmp_path / "base"), dtype="bfloat16")[0]
    exact = rounded(copy.deepcopy(half), torch.float32)
    before = logits(exact)
    model = stirred(add_lora(half, 4), 1e-3)
    save_policy(model, tokenizer, tmp_path / "policy")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "policy")
    assert {p.dtype for p in plain.parameters()} == {torch.float32}
    apart = PeftModel.from_pretrained(exact, tmp_path / "policy" / "adapters")
    changes = torch.stack([(logits(each) - before).flatten() for each in (plain, apart)])
    assert changes[0].abs().max() > 0
    assert torch.corrcoef(changes)[0, 1] > 0.9999
    assert {p.dtype for p in model.parameters() if not p.requires_grad} == {torch.bfloat16}  # it may go on


def test_the_policy_of_a_lora_run_is_evaluated_in_the_precision_it_is_saved_in():
    said = settings_to_save(laptop(lora_rank=2, dtype="bfloat16"), "2025-01-31")
    assert said["evaluated"]["dtype"] == "float32"


@pytest.mark.parametrize("lora_rank", [0, 2])
def test_a_models_own_generation_settings_come_back(lora_rank, llama, tokenizer, tmp_path):
    """Those of Qwen2.5, and one that transformers itself would not save."""
    own = {"do_sample": False, "top_p": 0.8, "top_k": 20, "repetition_penalty": 1.05, "eos_token_id": [4, 5]}
    llama.generation_config = GenerationConfig(**own)
    model = add_lora(llama, lora_rank) if lora_rank else llama
    sampler = Sampler(model, tokenizer, max_new_tokens=2, temperature=1.0)
    sampler([0], [[7, 8]])
    save_policy(model, tokenizer, tmp_path)
    saved = GenerationConfig.from_pretrained(tmp_path).to_dict()
    assert {name: saved[name] for name in own} == own
    again = load_model(str(tmp_path))[0]
    Sampler(again, tokenizer, max_new_tokens=2, temperature=1.0)([0], [[7, 8]])  # and do not leak into the next run
    assert again.generation_config.top_k is None and again.generation_config.repetition_penalty is None


# ---- left out --------------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["Qwen2Moe", "Qwen3_5Moe", "GptOss", "GraniteMoe", "Phimoe", "Llama4"])
def test_experts_without_adapters_are_named(kind):
    config = {"Qwen3_5Moe": "Qwen3_5MoeText", "Llama4": "Llama4Text"}.get(kind, kind)
    config, name = getattr(transformers, f"{config}Config"), getattr(transformers, f"{kind}ForCausalLM")
    model = without_dropout(small_model(config, name))
    experts = sum(p.numel() for n, p in model.named_parameters() if ".experts." in n)
    counted = sum(p.numel() for n, p in model.named_parameters() if p.ndim > 1 and "embed" not in n and "head" not in n)
    policy = add_lora(model, 2)
    check_model(policy, 64)  # routers that answer with several things run, too
    warning = left_out(policy)
    assert "experts.gate_up_proj" in warning and "experts.down_proj" in warning and "\n" not in warning
    share = int(warning.split("leaves ")[1].split("%")[0]) / 100
    assert experts / counted - 0.01 < share < experts / counted + 0.1


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("kind", "layer"), [("Jamba", "dt_proj"), ("LongcatFlash", "classifier")])
def test_adapters_of_weights_that_are_read_and_never_called_are_named(kind, layer, caplog):
    """They get no gradient and stay 0, so that a run merges exactly. Stirred by hand they do not: saving says so."""
    config, name = getattr(transformers, f"{kind}Config"), getattr(transformers, f"{kind}ForCausalLM")
    policy = add_lora(without_dropout(small_model(config, name)), 2)
    assert re.search(rf"no adapter reaches them: .*{layer}", left_out(policy))
    policy(input_ids=IDS, use_cache=False).logits.sum().backward()
    adapters = {n: p for n, p in policy.named_parameters() if f"{layer}.lora_" in n}
    assert adapters and all(p.grad is None for p in adapters.values())
    before = logits(policy).log_softmax(-1)
    assert (logits(merged_copy(policy)).log_softmax(-1) - before).abs().max() < 1e-5 and "merging" not in caplog.text
    with torch.no_grad():
        for parameter in adapters.values():
            parameter.add_(torch.randn_like(parameter))
    merged_copy(policy)
    assert "merging the adapters changes log-probs by" in caplog.text


def test_nothing_is_said_where_all_linear_layers_have_adapters(llama):
    assert left_out(add_lora(llama, 2)) is None


def test_an_architecture_that_peft_cannot_adapt_is_one_line():
    model = small_model(transformers.MambaConfig, transformers.MambaForCausalLM)
    with pytest.raises(ValueError, match="peft cannot adapt MambaForCausalLM") as raised:
        add_lora(model, 2)
    assert "\n" not in str(raised.value)


# ---- packed weights, and positions -----------------------------------------------------------------------------------


def test_weights_of_eight_bits_are_unpacked(tokenizer, tmp_path):
    model = small_llama(tokenizer, width=128)
    save_policy(model, tokenizer, tmp_path)
    weights = {}
    for name, weight in load_file(tmp_path / "model.safetensors").items():
        if "proj" in name:
            scale = weight.abs().max() / 448
            weights[name.replace(".weight", ".weight_scale_inv")] = scale.reshape(1, 1)
            weight = (weight / scale).to(torch.float8_e4m3fn)
        weights[name] = weight
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    file = tmp_path / "config.json"
    kind = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}
    file.write_text(json.dumps(json.loads(file.read_text()) | {"quantization_config": kind}))
    loaded = load_model(str(tmp_path))[0]
    assert all(p.dtype == torch.float32 and p.requires_grad for p in loaded.parameters())
    assert torch.allclose(logits(loaded), logits(model), atol=0.1)
    save_policy(loaded, tokenizer, tmp_path / "again")
    assert "quantization_config" not in json.loads((tmp_path / "again" / "config.json").read_text())


def test_limits_beyond_trained_positions_are_said_with_both_numbers_and_the_flag(llama):
    llama.config.max_position_embeddings = 256
    limits = {"--context-limit": 1144, "--skill-context-limit": 3072}
    told = untrained_positions(llama, limits)
    assert told == (
        "WARNING: the model was trained on 256 positions, fewer than --context-limit 1144 and "
        "--skill-context-limit 3072: lower to 256"
    )
    assert " --context-limit" not in untrained_positions(llama, limits | {"--context-limit": 256})
    assert untrained_positions(llama, {"--context-limit": 256}) is None
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 256, "rope_theta": 1e4}
    llama.config.rope_parameters = yarn  # Qwen's way: the other number stays as it was
    assert untrained_positions(llama, {"--context-limit": 1024}) is None
    assert "1024 positions" in untrained_positions(llama, {"--context-limit": 1025})


def test_a_run_says_so_at_its_start(tokenizer, tmp_path, capsys):
    save_policy(small_llama(tokenizer, max_position_embeddings=256), tokenizer, tmp_path / "adapters")
    of_run(tmp_path)
    assert "WARNING: the model was trained on 256 positions, fewer than --context-limit" in capsys.readouterr().out
