"""Scripted episodes as what a model is to say: token sequences in its own tokens, chat template and prompt style.

Of each game (see plays.Script for who plays), five kinds:

    acting alone        a novice with typical flaws
    under a skill       the same novice, less the flaws that the episode skill speaks about
    under a hint        the same novice, doing at that one step what the step skill says
    misled              the same novice under skills and hints that speak of another task, or say nothing: unchanged
    hindsight           the JSON of skills for the transcript of a novice's episode

A context is what a rollout would show, id by id, and a response is what a rollout would have sampled, its end-of-turn
token included. With the `official` prompt a response begins with the reason for it, as a short thought.
"""

from __future__ import annotations

import json
import random
from collections import deque
from dataclasses import dataclass, field
from pathlib import Path

from tqdm import tqdm

from data import Guidance, Skills, Step, Trajectory
from envs import make_env
from lm.encoder import Encoder, closing_token
from lm.scoring import Sequence, pack
from router import fill
from skills import analysis_prompt
from tiny.plays import EMPTY_WORDS, STEP_SKILLS, Play, one_flaw, script

HISTORY = 5  # steps shown in a window prompt: train.py's own default
HEARD = 50  # plays whose skills may stand where they do not fit
FOREIGN = 0.7  # share of such skills that speak of another task; the others say nothing
STREWN = 0.15  # chance, a step, of a hint that does not fit, in a play under a skill that does not


@dataclass
class Turn:
    """One turn of a play as an environment's prompt style has it."""

    observation: str
    admissible: list[str]
    action: str  # as the parser reads it from `response`
    response: str
    meant: bool  # neither a slip nor impossible: to be learnt


@dataclass
class Demonstration(Sequence):
    """A sequence to learn, with the rows of its responses that are given by what a skill says: they are few, and weigh
    more."""

    decisive: frozenset[int] = frozenset()


@dataclass
class Heard:
    """The skills of an earlier play, and what they speak of."""

    topic: str
    episode: str
    steps: list[str]


class Demonstrator:
    """Has games played by an environment's script, and turns the plays into sequences whose responses are to be learnt.

    `context_limit`: most tokens of a sequence; turns beyond it are left out, as a rollout ends there. Raises ValueError
    where the model's template begins answers in a way that compact commands cannot go on from.
    """

    def __init__(
        self,
        tokenizer,
        seed: int,
        env: str = "alfworld",
        *,
        prompt: str = "compact",
        context: str = "chat",
        context_limit: int | None = None,
        date: str | None = None,  # see Encoder
    ):
        self.tokenizer, self.rng, self.script = tokenizer, random.Random(seed), script(env)
        self.encoder, self.env = (
            Encoder(tokenizer, context, date),
            make_env(env, prompt=prompt, max_steps=self.script.MAX_STEPS, history=HISTORY),
        )
        self.prompt, self.context_limit = prompt, context_limit
        self.heard: deque[Heard] = deque(maxlen=HEARD)
        closing = closing_token(tokenizer)
        self.end = tokenizer.eos_token_id if closing is None else closing
        if self.encoder.began and prompt == "compact":
            raise ValueError(
                f"the chat template begins every answer with {self.encoder.began.strip()}: use --prompt official"
            )

    def sequences(self, game) -> list[Sequence]:
        """One game, played alone, under an episode skill, with hints and under skills that do not fit, and the
        hindsight of the first of these."""
        alone = self.play(game, self.flaws())
        skills = self.script.hindsight(alone)
        if alone.success or self.rng.random() < 0.5:
            guided = self.play(game, set(), skill=self.script.workflow(alone))
        else:
            guided = self.play(game, self.flaws() - {self.script.flaw_of(alone)}, skill=skills.episode)
        hinted = self.play(game, self.flaws(), hinted=self.script.HINTED)
        misled = self.mislead(self.play(game, self.flaws(), skill=self.misfit(alone)))
        played = [*self.acting(alone, self.script.ALONE_TURNS), *self.acting(guided), *self.acting(hinted)]
        played += self.acting(misled, self.script.ALONE_TURNS)
        self.heard.append(Heard(self.script.topic(alone), guided.skill, list(skills.steps.values())))
        return [*played, *self.writing(alone, skills)]

    def misfit(self, play: Play) -> str:
        """An episode skill that is of no use for the task: it speaks of another one, or says nothing."""
        others = [heard.episode for heard in self.heard if heard.topic != self.script.topic(play)]
        return self.rng.choice(others) if others and self.rng.random() < FOREIGN else self.nothing(3, 9)

    def mislead(self, play: Play) -> Play:
        """The same play with hints that are of no use: what was done stays as it is."""
        topic = self.script.topic(play)
        others = [text for heard in self.heard if heard.topic != topic for text in heard.steps]
        for t in range(len(play.turns)):
            if self.rng.random() < STREWN:
                misleading = others and self.rng.random() < FOREIGN
                play.hints[t] = self.rng.choice(others) if misleading else self.nothing(2, 3)
        return play

    def nothing(self, least: int, most: int) -> str:
        return " ".join(self.rng.choices(EMPTY_WORDS, k=self.rng.randint(least, most)))

    def judging(self, play: Play) -> list[Sequence]:
        """Whether a skill speaks of a task, asked of its own skills and of as many others: "yes" or "no"."""
        own = [self.script.workflow(play), *(self.script.avoidance(play, flaw) for flaw in self.script.FLAWS)]
        questions = [*((skill, "yes") for skill in own), *((self.misfit(play), "no") for _ in own)]
        self.heard.append(Heard(self.script.topic(play), self.rng.choice(own), []))
        return [s for skill, answer in questions for s in self.reply(f"task {play.task} skill {skill} fits", answer)]

    def flaws(self) -> set[str]:
        return one_flaw(self.script.FLAWS, self.rng)

    def play(self, game, flaws: set[str], *, skill: str = "", hinted: float = 0.0) -> Play:
        """An episode that a rollout could have: with the names and pages of the environment itself."""
        rng = random.Random(self.rng.random())
        return self.script.played(game, rng, flaws, prompt=self.prompt, skill=skill, hinted=hinted)

    def acting(self, play: Play, most: int | None = None) -> list[Sequence]:
        """A play, or its first `most` turns, with skill and hints in place. One sequence, or one a turn where contexts
        do not extend one another."""
        task, turns = self.turns(play)
        prompts, contexts, responses = [], [], []
        for t, turn in enumerate(turns[:most]):
            history = [(before.observation, before.action) for before in turns[:t]]
            prompt = self.env.build_prompt(self.encoder.style, task, history, turn.observation, turn.admissible)
            skilled = play.skill and (t == 0 or self.encoder.style == "window")
            skill = [Guidance("episode", play.skill)] if skilled else []
            hint = [Guidance("step", play.hints[t])] if t in play.hints else []
            prompts.append(fill(prompt, *skill, *hint))
            context, response = self.encoder.context(prompts, responses), self.answer(turn.response)
            if not self._fits(context, response):
                break
            contexts.append(context)
            responses.append(response)
        decisive = play.decisive if play.skill else play.decisive & play.hints.keys()
        learnt = []
        for sequence in pack(contexts, responses):
            if meant := [place for place in sequence.responses if turns[place[0]].meant]:
                learnt.append(Demonstration(sequence.ids, meant, decisive=frozenset(decisive)))
        return learnt

    def turns(self, play: Play) -> tuple[str, list[Turn]]:
        """-> (the task, the turns of a play), played again in the environment's own prompt style."""
        observation, info = self.env.reset(options={"game": play.game})
        task, turns = info["task"], []
        for t, (_, command, _) in enumerate(play.turns):
            response = command if self.prompt == "compact" else self.script.official(play, t, self.env)
            admissible = info["admissible_actions"]
            action, valid = self.env.parse_action(response, admissible)
            turns.append(Turn(observation, admissible, action, response, valid and t not in play.slips))
            observation, _, _, _, info = self.env.step(action)
        return task, turns

    def writing(self, play: Play, skills: Skills) -> list[Sequence]:
        """The hindsight prompt of a play, as training will build it, and the JSON to be learnt."""
        task, turns = self.turns(play)
        steps = [Step((), turn.observation, [], [], turn.response, turn.action, True) for turn in turns]
        prompt = analysis_prompt(Trajectory(task, 0, steps, play.success), STEP_SKILLS, self.env.analysis_prompt())
        return self.reply(prompt, self.spell(skills))

    def reply(self, prompt: str, text: str) -> list[Sequence]:
        """What is said to a prompt that stands alone; nothing where it does not fit."""
        context, response = self.encoder.context([prompt], []), self.answer(text)
        return pack([context], [response]) if self._fits(context, response) else []

    def spell(self, skills: Skills) -> str:
        """The JSON that the analysis prompt asks for."""
        steps = {str(t): text for t, text in skills.steps.items()}
        return json.dumps({"episode_summary": skills.summary, "episode_skill": skills.episode, "step_skills": steps})

    def answer(self, text: str) -> list[int]:
        """The ids of a response as it would be sampled: less what the template itself begins, and the turn's end."""
        opened = self.encoder.began.strip()
        if opened and text.startswith(opened):
            text = text.removeprefix(opened).lstrip()
        return [*self.tokenizer(text, add_special_tokens=False)["input_ids"], self.end]

    def _fits(self, context: list[int], response: list[int]) -> bool:
        return self.context_limit is None or len(context) + len(response) <= self.context_limit


def demonstrations(demonstrator: Demonstrator, games: int | None = None, plays: int | None = None) -> list[Sequence]:
    """`games` of the train split, each played `plays` times in each way (None: as many as the script says)."""
    source = demonstrator.script
    rounds = [game for _ in range(plays or source.PLAYS) for game in source.games(games or source.GAMES)]
    bar = tqdm(rounds, desc="demonstrations", disable=None)
    return [sequence for game in bar for sequence in demonstrator.sequences(game)]


def plays_alone(demonstrator: Demonstrator, games: int) -> list[Sequence]:
    """`games` of the train split, each played as often as `demonstrations` does, but always alone: nothing of them
    speaks of skills."""
    bar = tqdm(demonstrator.script.games(games), desc="demonstrations", disable=None)
    plays = (demonstrator.play(game, demonstrator.flaws()) for game in bar for _ in range(4))
    return [sequence for play in plays for sequence in demonstrator.acting(play, demonstrator.script.ALONE_TURNS)]


def judgements(demonstrator: Demonstrator) -> list[Sequence]:
    """Of each game of the train split, JUDGED times over: do skills speak of its task?"""
    source, sequences = demonstrator.script, []
    games = source.games(source.GAMES)
    for game in tqdm(games * source.JUDGED, desc="judgements", disable=None):
        sequences += demonstrator.judging(demonstrator.play(game, set()))
    return sequences


# ---- episodes of a run -----------------------------------------------------------------------------------------------


@dataclass
class RecordedPlay(Play):
    """An episode that a policy sampled, as tools/export.py writes it."""

    responses: list[str] = field(default_factory=list)  # as sampled, by turn
    skills: Skills | None = None  # that were written of it


class Recorded(Demonstrator):
    """Recorded episodes in place of scripted ones, played again, so that any model can learn them by its template."""

    def turns(self, play: RecordedPlay) -> tuple[str, list[Turn]]:
        """Raises ValueError where an episode does not go as it was recorded."""
        observation, info = self.env.reset(options={"game": play.game})
        task, turns = info["task"], []
        for t, (seen, did, _) in enumerate(play.turns):
            admissible = info.get("admissible_actions", [])
            action, valid = self.env.parse_action(play.responses[t], admissible)
            if (whole(observation), whole(action)) != (seen, did):
                raise ValueError(
                    f"step {t} of {play.game} goes otherwise than recorded: --env and --prompt must be those of the "
                    f"run, whose --env-options must be the defaults ({observation[:60]!r}, not {seen[:60]!r})"
                )
            turns.append(Turn(observation, admissible, action, play.responses[t], valid))
            observation, _, _, _, info = self.env.step(action)
        return task, turns

    def learnt(self, play: RecordedPlay) -> list[Sequence]:
        """The episode as it was played, without a skill, and the writing of its skills, where it has any."""
        written = self.writing(play, play.skills) if play.skills else []
        return [*self.acting(play), *written]


def whole(text: str) -> str:
    """Text as a file of UTF-8 has it: half a surrogate pair became a question mark."""
    return text.encode(errors="replace").decode()


def recorded(demonstrator: Recorded, file: str | Path, only: str) -> list[Sequence]:
    """The sequences of `only` "successes", or of "all" episodes of an export. Raises OSError or ValueError where it is
    no export, or none of its episodes is to be learnt."""
    from pyarrow import parquet

    plays = [play_of(row, str(file)) for row in parquet.read_table(file).to_pylist()]
    plays = [play for play in plays if play.turns and (play.success or only == "all")]
    if not plays:
        raise ValueError(f"{file} has no episode{' that succeeded' if only == 'successes' else ''}")
    demonstrator.env.max_steps = max(len(play.turns) for play in plays)
    bar = tqdm(plays, desc="demonstrations", disable=None)
    return [sequence for play in bar for sequence in demonstrator.learnt(play)]


def play_of(row: dict, file: str) -> RecordedPlay:
    try:
        steps, own = row["steps"], row["skills"]
        kept = own and sorted((skill["step"], skill["text"]) for skill in own["steps"])[:STEP_SKILLS]
        return RecordedPlay(
            row["task"],
            [(step["observation"], step["action"], "") for step in steps],
            success=row["success"],
            game=row["game"],
            responses=[step["response"] for step in steps],
            skills=own and Skills(own["summary"], own["episode"], dict(kept)),
        )
    except (KeyError, TypeError) as error:
        raise ValueError(f"{file} is no export of tools/export.py ({type(error).__name__} {error})") from None
