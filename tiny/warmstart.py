"""The laptop default: a Llama of about a million parameters that speaks one environment's closed vocabulary.

Instruct models come with two abilities that OPID leans on: following a skill in context, and writing one from a
transcript. The tiny model gets both, and only a weak ability to act, from minutes of supervised training on scripted
demonstrations from the train split, by the script of the environment (tiny/NAME.py, see plays.Script):

    acting alone        a novice with typical flaws
    under a skill       the same novice, less the flaws that the episode skill speaks about
    under a hint        the same novice, doing at that one step what the step skill says
    hindsight           the JSON of skills for the transcript of a novice's episode
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Collection
from pathlib import Path

import torch
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers
from tqdm import tqdm
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from data import Guidance, Skills, Step, Trajectory
from envs import make_env
from lm.encoder import Encoder
from lm.loading import write_whole
from lm.logprobs import sequence_logprobs
from lm.packing import Sequence, micro_batches
from router import fill
from skills import analysis_prompt
from tiny.plays import STEP_SKILLS, Play, script

LEARNING_RATE, BATCH_TOKENS = 3e-3, 1024
OTHER_TOKENS = 0.3  # weight of tokens that are not responses: they teach copying early, where responses alone do not


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


class Demonstrator:
    """Has games played by an environment's script, and turns the plays into sequences whose response tokens are to be
    learnt."""

    def __init__(self, tokenizer, seed: int, env: str = "alfworld"):
        self.tokenizer, self.rng, self.script = tokenizer, random.Random(seed), script(env)
        self.encoder, self.env = Encoder(tokenizer, "chat"), make_env(env, prompt="compact")

    def sequences(self, game) -> list[Sequence]:
        """One game, played alone, under an episode skill and with hints, and the hindsight of the first of these."""
        alone = self.play(game, self.flaws())
        skills = self.script.hindsight(alone)
        if alone.success or self.rng.random() < 0.5:
            guided = self.play(game, set(), skill=self.script.workflow(alone))
        else:
            guided = self.play(game, self.flaws() - {self.script.flaw_of(alone)}, skill=skills.episode)
        hinted = self.play(game, self.flaws(), hinted=self.script.HINTED)
        played = [self.acting(alone, self.script.ALONE_TURNS), self.acting(guided), self.acting(hinted)]
        return [*played, self.writing(alone, skills)]

    def flaws(self) -> set[str]:
        return {flaw for flaw, chance in self.script.FLAWS.items() if self.rng.random() < chance}

    def play(self, game, flaws: set[str], *, skill: str = "", hinted: float = 0.0) -> Play:
        return self.script.play(game, random.Random(self.rng.random()), flaws, skill=skill, hinted=hinted)

    def acting(self, play: Play, turns: int | None = None) -> Sequence:
        """The conversation of a play, or its first `turns`, skill and hints in place; every command but slips is to be
        learnt."""
        messages, responses, history = [], [], []
        for t, (observation, command, _) in enumerate(play.turns[:turns]):
            prompt = self.env.build_prompt("chat", play.task, history, observation, [])
            skill = [Guidance("episode", play.skill)] if t == 0 and play.skill else []
            hint = [Guidance("step", play.hints[t])] if t in play.hints else []
            messages.append(fill(prompt, *skill, *hint))
            responses.append(self._answer(command))
            history.append((observation, command))
        context = self.encoder.context(messages, responses[:-1])
        return self._sequence(context, responses, play.slips)

    def writing(self, play: Play, skills: Skills) -> Sequence:
        """The hindsight prompt of a play, as training will build it, and the JSON to be learnt."""
        steps = [Step((), seen, [], [], command, command, True) for seen, command, _ in play.turns]
        trajectory = Trajectory(play.task, 0, steps, play.success)
        prompt = analysis_prompt(trajectory, STEP_SKILLS, self.env.analysis_prompt())
        return self._sequence(self.encoder.context([prompt], []), [self._answer(skills_json(skills))])

    def _answer(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False)["input_ids"] + [self.tokenizer.eos_token_id]

    def _sequence(self, context: list[int], responses: list[list[int]], left_out: Collection[int] = ()) -> Sequence:
        """`context` ends where the last response starts; the earlier responses are found in it, one a turn."""
        ids, spans, turn = context + responses[-1], [], self.tokenizer.convert_tokens_to_ids("<assistant>")
        starts = [i + 1 for i, token in enumerate(context) if token == turn]
        for t, (start, response) in enumerate(zip(starts, responses, strict=True)):
            if t not in left_out:
                spans.append((0, start, len(response)))
        return Sequence(ids, spans)


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


def demonstration_loss(model, sequences: list[Sequence]) -> torch.Tensor:
    """Weighted mean of -log p a token, in nats: weight 1 on responses, OTHER_TOKENS on everything else."""
    whole = [Sequence(sequence.ids, [(row, 1, len(sequence.ids) - 1)]) for row, sequence in enumerate(sequences)]
    weights = torch.full((len(sequences), max(len(s.ids) for s in sequences)), OTHER_TOKENS)  # (S, L)
    for row, sequence in enumerate(sequences):
        for _, start, size in sequence.responses:
            weights[row, start - 1 : start - 1 + size] = 1.0
    with torch.autocast(model.device.type, torch.bfloat16):
        logprobs, rows, columns = sequence_logprobs(model, whole, 1.0)  # (N,)
    weights = weights.to(model.device)[rows, columns]  # (N,)
    return -(logprobs * weights).sum() / weights.sum()


def warm_start(model, sequences: list[Sequence], seed: int, *, epochs: int = 1) -> float:
    """Next-token training -> the mean loss of the last 50 steps, in nats a token."""
    training, rng, losses, batches = optimizers(model), random.Random(seed), [], []
    for _ in range(epochs):
        # Neighbours in length share a batch, but which batch comes when is random.
        epoch = micro_batches(sequences, BATCH_TOKENS)
        rng.shuffle(epoch)
        batches += epoch
    warmup = min(50, 1 + len(batches) // 10)
    bar = tqdm(batches, desc="warm start", mininterval=2)
    for step, batch in enumerate(bar):
        loss = demonstration_loss(model, batch)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in training:
            for group in optimizer.param_groups:
                group["lr"] = LEARNING_RATE * min(1.0, (step + 1) / warmup, 1.02 - step / len(batches))
            optimizer.step()
            optimizer.zero_grad()
        losses.append(loss.item())
        bar.set_postfix(refresh=False, loss=f"{sum(losses[-50:]) / len(losses[-50:]):.3f}")
    return sum(losses[-50:]) / len(losses[-50:])


def demonstrations(
    tokenizer, seed: int, *, env: str = "alfworld", games: int | None = None, plays: int | None = None
) -> list[Sequence]:
    """`games` of the train split, each played `plays` times in each way (None: as many as the script says)."""
    demonstrator = Demonstrator(tokenizer, seed, env)
    told = demonstrator.script
    rounds = [game for _ in range(plays or told.PLAYS) for game in told.games(games or told.GAMES)]
    bar = tqdm(rounds, desc="demonstrations", disable=None)
    return [sequence for game in bar for sequence in demonstrator.sequences(game)]


def cache_folder(env: str, seed: int, tokenizer, cache: str | Path) -> Path:
    """Named by all that the weights depend on: this code, the environment's code and data, its words, the seed."""
    root = Path(__file__).parent
    envs = root.with_name("envs")
    sources = [root / name for name in ("warmstart.py", "plays.py", f"{env}.py")]
    sources += [envs / "prompts.py", *(envs / env).glob("*.py"), *(envs / env).glob("data/*")]
    key = hashlib.sha256(f"{env} {seed} {sorted(tokenizer.get_vocab())}".encode())
    for path in sorted(sources):
        key.update(path.read_bytes())
    return Path(cache) / f"tiny-{env}-{key.hexdigest()[:12]}"


def warm_started(env: str = "alfworld", seed: int = 0, cache: str | Path = "cache"):
    """-> (model, tokenizer), trained on first use and kept in `cache`."""
    tokenizer = tiny_tokenizer(env)
    folder = cache_folder(env, seed, tokenizer, cache)
    if not folder.is_dir():
        model = tiny_model(len(tokenizer), seed)
        warm_start(model, demonstrations(tokenizer, seed, env=env), seed)
        write_whole(folder, model.save_pretrained)
    return LlamaForCausalLM.from_pretrained(folder), tokenizer
