"""The laptop default: a Llama of about a million parameters that speaks one environment's closed vocabulary.

Instruct models come with two abilities that OPID leans on: following a skill in context, and writing one from a
transcript. The tiny model gets both, and only a weak ability to act, from minutes of supervised training on scripted
demonstrations from the train split (demonstrations.py), by the script of the environment (tiny/NAME.py).
"""

from __future__ import annotations

import hashlib
import inspect
import io
import random
import sys
import tokenize
from collections.abc import Collection
from pathlib import Path

import torch
from filelock import FileLock
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from data import Skills
from envs import ENVIRONMENTS
from lm.loading import write_whole
from lm.precision import multiplies_bfloat16
from lm.scoring import Sequence, micro_batches
from tiny.demonstrations import Demonstrator, Turn, demonstrations, judgements
from tiny.muon import ExactMuon
from tiny.plays import Play, script
from tiny.supervised import DECISIVE, demonstration_loss, latest, shuffled_batches, teach, token_weights

LEARNING_RATE, BATCH_TOKENS = 3e-3, 1024
OTHER_TOKENS = 0.25  # weight of tokens that are not responses: they teach copying early, where responses alone do not
KEY_GAMES = 12  # whose demonstrations stand for all of them in the key of the weights
SEED = 0  # of the warm start: runs of all seeds begin with the same weights
LAYERS = 2  # of the benches' models: their keys and files do not name it, and they see no fresh games
WEIGHTS = Path(__file__).parent / "weights"


# ---- tokenizer and model ---------------------------------------------------------------------------------------------

JSON_OPEN, JSON_SKILL, JSON_STEPS = '{"episode_summary": "', '", "episode_skill": "', '", "step_skills": {'
JSON_PIECES = [JSON_OPEN, JSON_SKILL, JSON_STEPS, '",', '"}}', "}}", *(f'"{t}": "' for t in range(64))]
PROMPT_WORDS = "task skill hint now before did outcome success failure step write skills fits yes no"
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
        numbered = enumerate(play.turns)
        return play.task, [Turn(seen, [], command, command, t not in play.slips) for t, (seen, command, _) in numbered]

    def spell(self, skills: Skills) -> str:
        return skills_json(skills)


# ---- supervised training --------------------------------------------------------------------------------------------


def optimizers(model) -> list[torch.optim.Optimizer]:
    """Muon for the hidden matrices, which needs about half of AdamW's steps here, AdamW for everything else."""
    hidden, rest = [], []
    for name, parameter in model.named_parameters():
        (hidden if parameter.ndim == 2 and "embed" not in name else rest).append(parameter)
    muon = torch.optim.Muon if multiplies_bfloat16(model.device.type) else ExactMuon
    return [
        muon(hidden, lr=LEARNING_RATE, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(rest, lr=LEARNING_RATE, weight_decay=0.01, betas=(0.9, 0.98)),
    ]


def warm_start(
    model, sequences: list[Sequence], seed: int, *, judged: Collection[Sequence] = (), first: int = 0, epochs: int = 1
) -> float:
    """Next-token training -> the mean loss of the last steps, in nats a token. `first`: batches of `judged` before any
    other."""
    losses: list[float] = []
    teach(
        model,
        curriculum(judged, sequences, first, epochs, seed),
        optimizers(model),
        lambda batch: demonstration_loss(model, batch, OTHER_TOKENS, autocast=multiplies_bfloat16(model.device.type)),
        learning_rate=LEARNING_RATE,
        losses=losses,
        label="warm start",
    )
    return latest(losses)


def curriculum(
    judged: Collection[Sequence], played: list[Sequence], first: int, epochs: int, seed: int
) -> list[list[Sequence]]:
    """Batches of judgements alone, `first` of them, then the others, spread evenly among those of plays.

    Whether a skill speaks of this task has to be told before it can be heeded or not. In steps of nothing else two
    layers learn it within 400; mixed with plays from the beginning they had not in 1,200, and without more of them they
    forgot it in 200.
    """
    judging = shuffled_batches(list(judged), BATCH_TOKENS, 1, seed)
    batches, rest = judging[:first], judging[first:]
    plays = shuffled_batches(played, BATCH_TOKENS, epochs, seed)
    for i, batch in enumerate(plays, 1):
        batches += [batch, *rest[len(rest) * (i - 1) // len(plays) : len(rest) * i // len(plays)]]
    return batches


def key_of(env: str, tokenizer, seed: int = SEED, layers: int = LAYERS) -> str:
    """What the weights depend on, in 12 digits: the seed, the words, the demonstrations (the ids of the first games':
    all of them take minutes), and the code, less comments, that makes and trains the model."""
    demonstrator = TinyDemonstrator(tokenizer, seed, env)
    source = demonstrator.script
    games = source.games(KEY_GAMES)
    judged, played = once(demonstrator, games)
    learnt = [(s.ids, s.responses, sorted(getattr(s, "decisive", ()))) for s in [*judged, *played]]
    code = [tiny_model, optimizers, warm_start, curriculum, judgements, demonstrations]
    code += [teach, demonstration_loss, token_weights, shuffled_batches, micro_batches]
    code = [without_comments(inspect.getsource(function)) for function in code]
    settings = [LEARNING_RATE, BATCH_TOKENS, OTHER_TOKENS, DECISIVE]
    settings += [source.GAMES, source.PLAYS, source.JUDGED, source.JUDGED_FIRST]
    settings += [layers, source.FRESH] if layers != LAYERS else []
    key = repr((env, seed, sorted(tokenizer.get_vocab().items()), learnt, code, settings))
    return hashlib.sha256(key.encode()).hexdigest()[:12]


def once(demonstrator: TinyDemonstrator, games: list) -> tuple[list[Sequence], list[Sequence]]:
    """-> (judgements, plays) of each game, asked and played once."""
    judged = [s for game in games for s in demonstrator.judging(demonstrator.play(game, set()))]
    return judged, [s for game in games for s in demonstrator.sequences(game)]


def without_comments(source: str) -> str:
    """Text, and not a syntax tree, which other versions of Python print otherwise."""
    lines = source.splitlines()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            row, column = token.start
            lines[row - 1] = lines[row - 1][:column]
    return "\n".join(line.rstrip() for line in lines if line.strip())


def make(env: str, file: Path, tokenizer, key: str, seed: int = SEED, layers: int = LAYERS) -> None:
    """Train, and leave one file of bfloat16 weights (2 to 3 MB), with what they depend on and their last loss."""
    model, demonstrator = tiny_model(len(tokenizer), seed, layers=layers), TinyDemonstrator(tokenizer, seed, env)
    source, judged = demonstrator.script, judgements(demonstrator)
    loss = warm_start(model, demonstrations(demonstrator), seed, judged=judged, first=source.JUDGED_FIRST)
    if layers != LAYERS and source.FRESH:  # once more, the rate from its peak again
        demonstrator = TinyDemonstrator(tokenizer, seed + 1, env)
        games = source.games(source.GAMES + source.FRESH)[source.GAMES :]
        judged, played = once(demonstrator, games)
        loss = warm_start(model, played, seed + 1, judged=judged)
    state = {name: p.bfloat16() for name, p in model.state_dict().items() if name != "lm_head.weight"}  # tied
    metadata = {"format": "pt", "key": key, "loss": f"{loss:.4f}"}
    file.parent.mkdir(parents=True, exist_ok=True)
    write_whole(file, lambda path: save_file(state, path, metadata=metadata))


def made_of(file: Path) -> dict[str, str]:
    """What a file of weights says of itself: "key" and "loss"."""
    with safe_open(file, "pt") as opened:
        return opened.metadata()


def weights_of(env: str, layers: int) -> Path:
    """The file of weights that comes with the code."""
    return WEIGHTS / (f"{env}.safetensors" if layers == LAYERS else f"{env}-{layers}.safetensors")


def warm_started(env: str = "alfworld", cache: str | Path = "cache", seed: int = SEED, layers: int | None = None):
    """-> (model, tokenizer), in float32: the weights that come with the code, as long as they are what it would make.
    After a change of demonstrations or training, and for another seed of both, they are made on first use, and kept in
    `cache`. `layers` None: as many as the environment's script says."""
    tokenizer, layers = tiny_tokenizer(env), layers or script(env).LAYERS
    key, file = key_of(env, tokenizer, seed, layers), weights_of(env, layers)
    if not (file.is_file() and made_of(file)["key"] == key):
        file = Path(cache) / f"tiny-{env}-{key}.safetensors"
        file.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{file}.lock"):  # another process may be making them
            if not file.is_file():
                why = f"seed {seed} of the tiny model" if seed else "the tiny model's words or demonstrations changed"
                print(f"{why}: it is trained anew, 10 to 50 minutes ({file})", flush=True)
                make(env, file, tokenizer, key, seed, layers)
    model = tiny_model(len(tokenizer), seed, layers=layers)
    model.load_state_dict(load_file(file), strict=False)
    return model, tokenizer


def main() -> None:
    """python -m tiny.warmstart [ENVIRONMENT ...]: makes the weights of the code, ten to fifty minutes each."""
    for env in sys.argv[1:] or ENVIRONMENTS:
        tokenizer, layers = tiny_tokenizer(env), script(env).LAYERS
        make(env, weights_of(env, layers), tokenizer, key_of(env, tokenizer, layers=layers), layers=layers)


if __name__ == "__main__":
    main()
