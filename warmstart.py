"""The laptop default: a Llama of about a million parameters that speaks ALFWorld's closed vocabulary.

Instruct models come with two abilities that OPID leans on: following a skill in context, and writing one from a
transcript. The tiny model gets both, and only a weak ability to act, from minutes of supervised training on scripted
demonstrations from the generator's train rooms:

    acting alone        a novice with typical flaws (forgets to heat, leaves closed things shut, dawdles)
    under a skill       the same novice, less the flaws that the episode skill speaks about
    under a hint        the same novice, doing at that one step what the step skill says
    hindsight           the JSON of skills for the transcript of a novice's episode

The skills are general: the order of work, what to check, what to avoid, where such things are usually found. They never
say where the thing lay in this very game: a policy that is re-scored under facts which it cannot see is taught to act
on them, and training collapses.
"""

from __future__ import annotations

import hashlib
import json
import random
import re
from dataclasses import dataclass, field
from pathlib import Path

import torch
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers
from tqdm import tqdm
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from data import Skills, Step, Trajectory
from envs.alfworld import COMPACT_ANALYSIS, AlfworldEnv, generate_games, words
from envs.alfworld_engine import FastEngine, load_game
from envs.alfworld_expert import TOOLS, Explorer, kind_of
from envs.alfworld_rooms import DATA, FACTS, likely_places
from rescore import Sequence, micro_batches, sequence_logprobs
from rollout import Encoder
from runlog import replace
from skills import analysis_prompt

GAMES = 2000  # generated train games that demonstrations come from
PLAYS = 2  # times that each is played in each way
FLAWS = {"forget": 0.65, "shut": 0.55}  # chance that a novice has the flaw
SLIP = 0.12  # chance of a random command, a step
HINTED = 0.25  # share of steps with a hint, in hinted play
MAX_STEPS = 20
STEP_SKILLS = 3  # at most, in a demonstration of hindsight
LEARNING_RATE, BATCH_TOKENS = 2e-3, 4096


# ---- tokenizer and model ---------------------------------------------------------------------------------------------

JSON_OPEN, JSON_SKILL, JSON_STEPS = '{"episode_summary": "', '", "episode_skill": "', '", "step_skills": {'
JSON_PIECES = [JSON_OPEN, JSON_SKILL, JSON_STEPS, '",', '"}}', "}}", *(f'"{t}": "' for t in range(64))]
PROMPT_WORDS = (
    "task skill hint now before did outcome success failure step write skills first then find never every leave "
    "without again same stop after one second done closed not nothing happens"
)
CHAT_TEMPLATE = (
    "{% for m in messages %}{% if m['role'] == 'assistant' %}{{ m['content'] }}<end>"
    "{% else %}<user>{{ m['content'] }}<assistant>{% endif %}{% endfor %}"
)


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """Word level: every word of the games, of the compact prompts and of the demonstrations is one token, and so is
    each piece of the skills' JSON, so that the tiny model writes the same JSON through the same code path."""
    kinds = (name.lower() for name in FACTS["object_types"] + FACTS["receptacle_types"])
    wordings = " ".join(text for goal in FACTS["goals"].values() for text in goal["templates"])
    texts = re.findall(r"[a-z]+", f"{wordings} {(DATA / 'alfred.twl2').read_text()}".lower())  # all the engine can say
    known = sorted({*kinds, *texts, *PROMPT_WORDS.split(), ":", "->", *map(str, range(64))})
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


# ---- demonstrations --------------------------------------------------------------------------------------------------


@dataclass
class Play:
    """One scripted episode: what was seen and done, what a good player would have done, and which hints were shown."""

    task: str
    task_type: str
    thing: str
    parent: str
    lamp: str
    turns: list[tuple[str, str, str]] = field(default_factory=list)  # (observation, command, advice)
    critical: list[bool] = field(default_factory=list)  # a step that decides something
    advice_in_words: list[str] = field(default_factory=list)  # the step skill that each step could have had
    hints: dict[int, str] = field(default_factory=dict)
    skill: str = ""  # the episode skill that it was played under
    success: bool = False


class Adviser(Explorer):
    """An Explorer that can look over a novice's shoulder: it copes with commands that it would not have given."""

    def reset(self, observation: str) -> None:
        super().reset(observation)
        self.treated: set[str] = set()
        self.origin = ""  # where what is held was taken from

    def _remember(self, observation: str) -> None:
        verb, names = self.command.split()[0], re.findall(r"[a-z]+ \d+", self.command)
        happened = not observation.startswith("Nothing happens")
        if happened and verb == "take":
            self.origin = names[1]
            self.seen.setdefault(names[0], names[1])
        super()._remember(observation)
        if happened and verb in ("clean", "heat", "cool"):
            self.treated.add(names[0])
        elif happened and verb == "take":
            self.ready = self.task_type not in TOOLS or names[0] in self.treated
        elif happened and verb == "close":
            self.closed.add(names[0])

    def _bring(self) -> str:
        if kind_of(self.held) != self.thing:
            return self._reach(self.origin) or f"move {self.held} to {self.origin}"
        return super()._bring()

    def critical(self) -> bool:
        """Whether the step decides something: a chance to open, take, treat, place or use, or the way there."""
        return not self.command.startswith("go ") or bool(self.held)

    def careless(self, rng: random.Random) -> str | None:
        """What somebody does who forgets half of the task, or None where there is nothing to forget."""
        if self.task_type in TOOLS and self.held and not self.ready:
            place = self._destination()
            return self._reach(place) or f"move {self.held} to {place}"
        if self.task_type == "look_at_obj_in_light" and self.held and self.at:
            return f"move {self.held} to {self.at}"
        if self.task_type == "pick_two_obj_and_place" and not self.held and self.target:
            return f"go to {rng.choice(self.receptacles)}"
        return None


def play(
    game, rng: random.Random, flaws: set[str], *, skill: str = "", hinted: float = 0.0, slip: float = SLIP
) -> Play:
    """One episode of a novice with `flaws`; at a share `hinted` of the steps it is given the adviser's hint and acts on
    it."""
    engine, adviser = FastEngine(game), Adviser(rng, likely_places)
    observation = engine.reset()
    adviser.reset(observation)
    record = Play(words(game.task), game.task_type, adviser.thing, adviser.parent, adviser.lamp, skill=skill)
    observation = observation.partition("\n\n")[2].partition("\n\nYour task is to:")[0]
    for t in range(MAX_STEPS):
        advice = adviser.act(observation)
        record.critical.append(adviser.critical())
        record.advice_in_words.append(hint(advice, adviser.held))
        command = advice
        if rng.random() < hinted:
            record.hints[t] = record.advice_in_words[t]
        else:
            if "forget" in flaws:
                command = adviser.careless(rng) or command
            if "shut" in flaws and command.startswith("open "):
                command = f"go to {rng.choice(adviser.receptacles)}"
            if rng.random() < slip:
                command = rng.choice([c for c in engine.admissible_commands() if c not in ("help", "inventory")])
        record.turns.append((words(observation), command, advice))
        adviser.command = command
        observation = engine.step(command)
        if engine.won:
            record.success = True
            break
    return record


# ---- skills, as a script would write them ---------------------------------------------------------------------------


def hint(advice: str, held: str) -> str:
    """A step skill: the advice in general words, without the numbers that only this game gives to things."""
    verb, *kinds = [word for word in advice.split() if not word.isdigit()]
    if verb == "go":
        return f"go to {kinds[-1]}" if held else f"look in {kinds[-1]}"
    return f"take {kinds[0]}" if verb == "take" else " ".join([verb, *kinds])


def order_of_work(play: Play) -> str:
    """What is done with the thing once it is found."""
    thing, parent = play.thing, play.parent
    if play.task_type in TOOLS:
        verb, tool = TOOLS[play.task_type]
        return f"{verb} {thing} with {tool} then move {thing} to {parent}"
    if play.task_type == "look_at_obj_in_light":
        return f"find {play.lamp} then use {play.lamp}"
    again = f" then find second {thing} then move {thing} to {parent}"
    return f"move {thing} to {parent}" + (again if play.task_type == "pick_two_obj_and_place" else "")


def workflow(play: Play) -> str:
    """The order of work for this kind of task, with where such things are usually found."""
    places = " or ".join(likely_places(play.thing)[:2])
    return (
        f"first find {play.thing} look in {places} open every closed place then take {play.thing} then "
        f"{order_of_work(play)}"
    )


def avoidance(play: Play, flaw: str) -> str:
    """What to avoid, and so what to do instead, for one flaw."""
    thing, parent = play.thing, play.parent
    if flaw == "shut":
        return "never leave closed place without you open it"
    if play.task_type in TOOLS:
        verb, tool = TOOLS[play.task_type]
        return f"never move {thing} to {parent} before you {verb} {thing} with {tool}"
    if play.task_type == "look_at_obj_in_light":
        return f"never move {thing} before you use {play.lamp}"
    if play.task_type == "pick_two_obj_and_place":
        return f"never stop after one {thing} find second {thing}"
    return "never look in same place again"


def flaw_of(play: Play) -> str:
    """What went wrong in a failed episode, read off what was done where something else was called for."""
    for _, command, advice in play.turns:
        if advice.startswith("open ") and not command.startswith("open "):
            return "shut"
    return "forget"


def hindsight(play: Play) -> Skills:
    """The skills of a finished episode. A step skill says what could have been known at its step."""
    missed = [t for t, (_, command, advice) in enumerate(play.turns) if play.critical[t] and command != advice]
    met = [t for t, (_, command, advice) in enumerate(play.turns) if play.critical[t] and command == advice]
    chosen = sorted((met if play.success else missed)[:STEP_SKILLS])
    steps = {t: play.advice_in_words[t] for t in chosen}
    if play.success:
        return Skills("done", workflow(play), steps)
    flaw = flaw_of(play)
    return Skills("closed place" if flaw == "shut" else "not done", avoidance(play, flaw), steps)


def skills_json(skills: Skills) -> str:
    """The JSON as the tiny tokenizer spells it: one token a piece."""
    steps = " ".join(f'"{t}": " {text} ",' for t, text in skills.steps.items()).removesuffix('",')
    end = f'{steps}"}}}}' if steps else "}}"
    return f"{JSON_OPEN} {skills.summary} {JSON_SKILL} {skills.episode} {JSON_STEPS} {end}"


# ---- demonstrations as token sequences ------------------------------------------------------------------------------


class Demonstrator:
    """Plays games and turns the plays into sequences whose response tokens are to be learnt."""

    def __init__(self, tokenizer, seed: int):
        self.tokenizer, self.rng = tokenizer, random.Random(seed)
        self.encoder, self.env = Encoder(tokenizer, "chat"), AlfworldEnv(prompt="compact")

    def sequences(self, game) -> list[Sequence]:
        """One game, played alone, under an episode skill and with hints, and the hindsight of the first of these."""
        alone = self.play(game, self.flaws())
        skills = hindsight(alone)
        if alone.success or self.rng.random() < 0.5:
            guided = self.play(game, set(), skill=workflow(alone), slip=0.0)
        else:
            guided = self.play(game, self.flaws() - {flaw_of(alone)}, skill=skills.episode, slip=0.0)
        hinted = self.play(game, self.flaws(), hinted=HINTED)
        return [*map(self.acting, (alone, guided, hinted)), self.writing(alone, skills)]

    def flaws(self) -> set[str]:
        return {flaw for flaw, chance in FLAWS.items() if self.rng.random() < chance}

    def play(self, game, flaws: set[str], **options) -> Play:
        return play(game, random.Random(self.rng.random()), flaws, **options)

    def acting(self, play: Play) -> Sequence:
        """The conversation of a play, skill and hints in their slots; every command is to be learnt."""
        messages, responses, history = [], [], []
        for t, (observation, command, _) in enumerate(play.turns):
            prompt = self.env.build_prompt("chat", play.task, history, observation, [])
            messages.append(
                fill_slots(prompt, {"episode": play.skill if t == 0 else "", "step": play.hints.get(t, "")})
            )
            responses.append(self._answer(command))
            history.append((observation, command))
        context = self.encoder.context(messages, responses[:-1])
        return self._sequence(context, responses)

    def writing(self, play: Play, skills: Skills) -> Sequence:
        """The hindsight prompt of a play, as training will build it, and the JSON to be learnt."""
        steps = [Step((), seen, [], [], command, command, True) for seen, command, _ in play.turns]
        trajectory = Trajectory(play.task, 0, steps, play.success)
        prompt = analysis_prompt(trajectory, STEP_SKILLS, COMPACT_ANALYSIS)
        return self._sequence(self.encoder.context([prompt], []), [self._answer(skills_json(skills))])

    def _answer(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False)["input_ids"] + [self.tokenizer.eos_token_id]

    def _sequence(self, context: list[int], responses: list[list[int]]) -> Sequence:
        """`context` ends where the last response starts; the earlier responses are found in it, one a turn."""
        ids, spans, turn = context + responses[-1], [], self.tokenizer.convert_tokens_to_ids("<assistant>")
        starts = [i + 1 for i, token in enumerate(context) if token == turn]
        for start, response in zip(starts, responses, strict=True):
            spans.append((0, start, len(response)))
        return Sequence(ids, spans)


def fill_slots(prompt, texts: dict[str, str]) -> str:
    """Like router.fill, for several skills at once: hinted play shows more than one step skill in a conversation."""

    def show(piece) -> str:
        if isinstance(piece, str):
            return piece
        return piece.template.format(text=texts[piece.level]) if texts[piece.level] else ""

    return "".join(map(show, prompt))


# ---- supervised training --------------------------------------------------------------------------------------------


def warm_start(model, sequences: list[Sequence], seed: int, *, epochs: int = 1) -> float:
    """Next-token training on the response tokens -> the mean loss of the last 50 steps, in nats a token."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=0.01, betas=(0.9, 0.98))
    rng, losses = random.Random(seed), []
    batches = []
    for _ in range(epochs):
        # Neighbours in length share a batch, but which batch comes when is random.
        epoch = micro_batches(sequences, BATCH_TOKENS)
        rng.shuffle(epoch)
        batches += epoch
    warmup = min(50, 1 + len(batches) // 10)
    bar = tqdm(batches, desc="warm start", mininterval=2)
    for step, batch in enumerate(bar):
        progress = step / len(batches)
        for group in optimizer.param_groups:
            group["lr"] = LEARNING_RATE * min(1.0, (step + 1) / warmup, 1.02 - progress)
        with torch.autocast("cpu", torch.bfloat16):
            logprobs, _, _ = sequence_logprobs(model, batch, 1.0)
        loss = -logprobs.mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        bar.set_postfix(loss=f"{sum(losses[-50:]) / len(losses[-50:]):.3f}")
    return sum(losses[-50:]) / len(losses[-50:])


def demonstrations(tokenizer, seed: int, games: int = GAMES, plays: int = PLAYS) -> list[Sequence]:
    paths = generate_games("cache/alfworld-small", "train", games, 0, size="small")
    demonstrator = Demonstrator(tokenizer, seed)
    rounds = tqdm([path for _ in range(plays) for path in paths], desc="demonstrations", disable=None)
    return [sequence for path in rounds for sequence in demonstrator.sequences(load_game(path))]


def warm_started(seed: int = 0, cache: str | Path = "cache"):
    """-> (model, tokenizer), trained on first use and kept in `cache` under a hash of this file and the seed."""
    tokenizer = tiny_tokenizer()
    key = hashlib.sha256(Path(__file__).read_bytes() + json.dumps(seed).encode()).hexdigest()[:12]
    folder = Path(cache) / f"tiny-{key}"
    if not folder.is_dir():
        model = tiny_model(len(tokenizer), seed)
        warm_start(model, demonstrations(tokenizer, seed), seed)
        replace(folder, model.save_pretrained)
    return LlamaForCausalLM.from_pretrained(folder), tokenizer
