"""The laptop default: a Llama of about a million parameters that speaks one environment's closed vocabulary.

Instruct models come with two abilities that OPID leans on: following a skill in context, and writing one from a
transcript. The tiny model gets both, and only a weak ability to act, from minutes of supervised training on scripted
demonstrations from the train split (demonstrations.py), by the script of the environment (tiny/NAME.py).
"""

from __future__ import annotations

import ast
import hashlib
import inspect
import random
from pathlib import Path

import torch
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from data import Skills
from lm.loading import write_whole
from lm.packing import Sequence, micro_batches
from tiny.demonstrations import Demonstrator, Turn, demonstrations
from tiny.plays import Play, script
from tiny.supervised import demonstration_loss, latest, shuffled_batches, teach

LEARNING_RATE, BATCH_TOKENS = 3e-3, 1024
OTHER_TOKENS = 0.3  # weight of tokens that are not responses: they teach copying early, where responses alone do not
KEY_GAMES = 12  # whose demonstrations name the folder of the weights


# ---- tokenizer and model ---------------------------------------------------------------------------------------------

JSON_OPEN, JSON_SKILL, JSON_STEPS = '{"episode_summary": "', '", "episode_skill": "', '", "step_skills": {'
JSON_PIECES = [JSON_OPEN, JSON_SKILL, JSON_STEPS, '",', '"}}', "}}", *(f'"{t}": "' for t in range(64))]
PROMPT_WORDS = "task skill hint now before did outcome success failure step write skills"
CHAT_TEMPLATE = (
    "{% for m in messages %}{% if m['role'] == 'assistant' %}{{ m['content'] }}<end>"
    "{% else %}<user>{{ m['content'] }}<assistant>{% endif %}{% endfor %}"
)


def tiny_tokenizer(env: str = "alfworld") -> PreTrainedTokenizerFast:
    """Word level: every word of the environment, of the compact prompts and of the demonstrations is one token, and so
    is each piece of the skills' JSON, so that the tiny model writes the same JSON through the same code path."""
    known = sorted({*script(env).vocabulary(), *PROMPT_WORDS.split(), ":", "->", *map(str, range(64))})
    special = ["<pad>", "<unk>", "<user>", "<assistant>", "<end>"]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate([*special, *known])}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in special if token != "<unk>"])
    tokenizer.add_tokens([AddedToken(piece, normalized=False) for piece in JSON_PIECES])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        unk_token="<unk>",
        eos_token="<end>",
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
    )


def tiny_model(vocabulary_size: int, seed: int, width: int = 192, layers: int = 2) -> LlamaForCausalLM:
    """A fresh Llama: 0.9 million parameters at the default size."""
    torch.manual_seed(seed)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=vocabulary_size,
            hidden_size=width,
            intermediate_size=width * 5 // 2,
            num_hidden_layers=layers,
            num_attention_heads=6,
            num_key_value_heads=6,
            max_position_embeddings=2048,
            tie_word_embeddings=True,
            pad_token_id=0,
            bos_token_id=None,
            eos_token_id=4,
        )
    )


# ---- demonstrations as token sequences ------------------------------------------------------------------------------


def skills_json(skills: Skills) -> str:
    """The JSON as the tiny tokenizer spells it: one token a piece."""
    steps = " ".join(f'"{t}": " {text} ",' for t, text in skills.steps.items()).removesuffix('",')
    end = f'{steps}"}}}}' if steps else "}}"
    return f"{JSON_OPEN} {skills.summary} {JSON_SKILL} {skills.episode} {JSON_STEPS} {end}"


class TinyDemonstrator(Demonstrator):
    """Demonstrations in the tiny model's words."""

    def play(self, game, flaws: set[str], *, skill: str = "", hinted: float = 0.0) -> Play:
        return self.script.play(game, random.Random(self.rng.random()), flaws, skill=skill, hinted=hinted)

    def turns(self, play: Play) -> tuple[str, list[Turn]]:
        """As they were played: where names are exchanged for others, they cannot be played again."""
        told = enumerate(play.turns)
        return play.task, [Turn(seen, [], command, command, t not in play.slips) for t, (seen, command, _) in told]

    def spell(self, skills: Skills) -> str:
        return skills_json(skills)


# ---- supervised training --------------------------------------------------------------------------------------------


def optimizers(model) -> list[torch.optim.Optimizer]:
    """Muon for the hidden matrices, which needs about half of AdamW's steps here, AdamW for everything else."""
    hidden, rest = [], []
    for name, parameter in model.named_parameters():
        (hidden if parameter.ndim == 2 and "embed" not in name else rest).append(parameter)
    return [
        torch.optim.Muon(hidden, lr=LEARNING_RATE, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(rest, lr=LEARNING_RATE, weight_decay=0.01, betas=(0.9, 0.98)),
    ]


def warm_start(model, sequences: list[Sequence], seed: int, *, epochs: int = 1) -> float:
    """Next-token training -> the mean loss of the last steps, in nats a token."""
    losses: list[float] = []
    teach(
        model,
        shuffled_batches(sequences, BATCH_TOKENS, epochs, seed),
        optimizers(model),
        lambda batch: demonstration_loss(model, batch, OTHER_TOKENS),
        learning_rate=LEARNING_RATE,
        losses=losses,
        label="warm start",
    )
    return latest(losses)


def cache_folder(env: str, seed: int, tokenizer, cache: str | Path) -> Path:
    """Named by what the weights depend on: the seed, the words, the demonstrations (the ids of the first games': all of
    them take minutes), and the code, less comments, that makes and trains the model."""
    demonstrator = TinyDemonstrator(tokenizer, seed, env)
    told = demonstrator.script
    learnt = [(s.ids, s.responses) for game in told.games(KEY_GAMES) for s in demonstrator.sequences(game)]
    code = [tiny_model, optimizers, warm_start, teach, demonstration_loss, shuffled_batches, micro_batches]
    code = [ast.dump(ast.parse(inspect.getsource(function))) for function in code]
    settings = (LEARNING_RATE, BATCH_TOKENS, OTHER_TOKENS, told.GAMES, told.PLAYS)
    key = repr((env, seed, sorted(tokenizer.get_vocab().items()), learnt, code, settings))
    return Path(cache) / f"tiny-{env}-{hashlib.sha256(key.encode()).hexdigest()[:12]}"


def warm_started(env: str = "alfworld", seed: int = 0, cache: str | Path = "cache"):
    """-> (model, tokenizer), trained on first use and kept in `cache`."""
    tokenizer = tiny_tokenizer(env)
    folder = cache_folder(env, seed, tokenizer, cache)
    if not folder.is_dir():
        model = tiny_model(len(tokenizer), seed)
        warm_start(model, demonstrations(TinyDemonstrator(tokenizer, seed, env)), seed)
        write_whole(folder, model.save_pretrained)
    return LlamaForCausalLM.from_pretrained(folder), tokenizer
