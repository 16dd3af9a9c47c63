"""What tests share: a tiny random model for speed, the real small model for truth, generated games."""

import copy
from pathlib import Path

import hypothesis
import pytest
import torch
from accelerate.state import AcceleratorState
from filelock import FileLock
from transformers import Qwen2Config, Qwen2ForCausalLM, Qwen3Config, Qwen3ForCausalLM

import runlog.start as start_module
from envs.alfworld import AlfworldEnv, generate_games
from lm.loading import save_policy
from tiny.loading import load_model
from tiny.warmstart import tiny_model, tiny_tokenizer

hypothesis.settings.register_profile("any machine", deadline=None)  # a busy one must not fail a test
# The long search: pytest --hypothesis-profile=fuzz -k fuzz. The same inputs every time, so that it can be repeated.
hypothesis.settings.register_profile("fuzz", deadline=None, max_examples=20_000, derandomize=True, database=None)
hypothesis.settings.load_profile("any machine")

SMALL = {
    "hidden_size": 48,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
    "eos_token_id": 4,
}


@pytest.fixture(scope="session")
def tokenizer():
    return tiny_tokenizer()


@pytest.fixture
def own_precision():
    """accelerate keeps one precision for all runs of a process: this test's own, and none left for the next."""
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture
def llama(tokenizer):
    """A random model, its weights scaled up so that its log-probs are far from uniform."""
    return sharpen(tiny_model(len(tokenizer), seed=0, width=48))


@pytest.fixture
def random_tiny(monkeypatch, llama, tokenizer):
    """`--model tiny` without its warm start, and skills by a script, since a random model writes none."""
    # half of its responses count as valid, so that there is an outcome to learn from
    monkeypatch.setattr(AlfworldEnv, "parse_action", lambda self, text, admissible: (text, len(text) % 2 == 0))
    monkeypatch.setattr(start_module, "load_model", lambda *a, **k: (copy.deepcopy(llama), tokenizer))
    answer = '{"episode_summary": "s", "episode_skill": "open every closed place", "step_skills": {"1": "look in bed"}}'
    monkeypatch.setattr(start_module, "model_writer", lambda *a, **k: lambda prompts: [answer] * len(prompts))


@pytest.fixture
def qwen(tokenizer):
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=len(tokenizer),
        **SMALL,
        tie_word_embeddings=True,
    )
    return sharpen(Qwen2ForCausalLM(config))


@pytest.fixture
def qwen3(tokenizer):
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        **SMALL,
        head_dim=16,
    )
    return sharpen(Qwen3ForCausalLM(config))


def sharpen(model):
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3)
    return model.eval()


@pytest.fixture(scope="session")
def made_once(tmp_path_factory, worker_id):
    """(name, make) -> the folder that make(folder) filled for all workers; those that come later wait for the first."""

    def folder_of(name: str, make) -> Path:
        base = tmp_path_factory.getbasetemp()
        folder = (base if worker_id == "master" else base.parent) / name
        with FileLock(f"{folder}.lock"):
            if not (folder / "made").exists():
                folder.mkdir(exist_ok=True)
                make(folder)
                (folder / "made").touch()
        return folder

    return folder_of


@pytest.fixture(scope="session")
def smollm2(made_once):
    """(model, tokenizer) of SmolLM2-135M-Instruct, float32. Unpacking it takes half a minute."""
    model, tokenizer = load_model(str(made_once("smollm2", lambda folder: save_policy(*load_model("smollm2"), folder))))
    return model.eval(), tokenizer


@pytest.fixture(scope="session")
def games(tmp_path_factory):
    return generate_games(tmp_path_factory.mktemp("games"), "train", 6, 0, size="small")


@pytest.fixture
def compact_env():
    return lambda: AlfworldEnv(prompt="compact", max_steps=5)
