"""Play an episode yourself, with the model looking on: python tools/play.py --env alfworld

You see what the policy sees, and how likely it finds each command. Type a skill, and see which commands it moves. Once
the episode is over the model writes skills about it: every word of your answers is praised or blamed. `help` lists what
you can type. Flags of train.py go on top, such as --env search, --model runs/laptop or --seed 1.
"""

from __future__ import annotations

import argparse
import math
import os
import re
import shutil
import sys
import textwrap
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field, replace
from difflib import get_close_matches
from random import Random
from typing import Any, NamedTuple

from pathlib import Path  # isort: skip

sys.path.insert(0, str(Path(__file__).parent.parent))
import lm  # isort: skip

import torch
from torch import Tensor

from advantage import skill_advantage
from config import Config, parse_args
from data import Contexts, Guidance, Skills, Step
from envs import Guard, Guarded
from envs.alfworld.engine import FastEngine
from envs.alfworld.expert import shortest_plan
from envs.guard import one_line
from evaluate import environment, eval_splits, games_of, misfits
from lm.encoder import Encoder, closing_token
from lm.loading import about_policy
from lm.precision import device_of
from lm.sampler import Sampler, end_of_turn_ids
from lm.scoring import response_logprobs
from lm.writers import model_writer
from rescore import skill_context, skill_contexts
from rollout import Episode
from router import LEVELS, route
from skills import write_skills
from tiny.loading import load_model
from tiny.plays import script

SITTING = 20  # games that are made ready: one after another by `new`
SHOWN = 10  # commands of a turn, the likeliest first
PLACEHOLDER = re.compile(r"<[\w ]+>")  # in a listed command: words of one's own go there
NARROWEST = 40  # columns; a terminal with fewer wraps the lines itself
FULL = 3.0  # nats of the deepest colour: a factor of 20 in probability
# 256-colour backgrounds, the fainter first, each with a letter colour that can be read on it
BLUE = ((189, 16), (153, 16), (111, 16), (69, 231), (27, 231))
ORANGE = ((230, 16), (223, 16), (215, 16), (208, 16), (202, 16))
WORDS = {
    "help": "these words",
    "list": "all commands, and their probabilities",
    "sample": "the model plays this step, without any skill",
    "expert": "what the expert would do now",
    "try TEXT": "how likely the model finds TEXT; nothing is played",
    "do TEXT": "plays TEXT, even where it is a word of this list",
    "skill TEXT": "puts an episode skill into the prompt, after the task; alone: takes it out",
    "hint TEXT": "puts a step skill into this turn, where it takes the episode skill's place; alone: takes it out",
    "prompt": "what the model reads now",
    "write": "after the episode: the model writes skills, and they judge your answers",
    "new": "the next game",
    "quit": "ends this (so do Ctrl-C and Ctrl-D)",
}


# ---- the model -------------------------------------------------------------------------------------------------------


@dataclass
class Model:
    """A model that looks on, with what it needs to read, score, sample and write."""

    config: Config
    net: Any
    encoder: Encoder

    @classmethod
    def load(cls, config: Config) -> Model:
        net, tokenizer = load_model(config.model, env=config.env, dtype=config.dtype)
        date, ends = about_policy(config.model).get("date"), end_of_turn_ids(net, tokenizer)
        encoder = Encoder(tokenizer, config.context, date, config.template_options, ends)
        return cls(config, net.to(device_of(config.device)).eval(), encoder)

    def logprobs(self, contexts: Contexts, responses: list[list[int]]) -> Tensor:
        """log pi(y | h) of each token. -> (B, R), NaN where there is none"""
        temperature, budget = self.config.temperature, self.config.token_budget
        return response_logprobs(self.net, contexts, responses, temperature=temperature, token_budget=budget)

    def response(self, text: str) -> list[int]:
        """A typed answer as it would be sampled, end of turn included. Raises ValueError where it ends in between."""
        tokenizer = self.encoder.tokenizer
        ids, closing = tokenizer(text, add_special_tokens=False)["input_ids"], closing_token(tokenizer)
        if self.encoder.ends.intersection(ids):
            raise ValueError("an answer cannot hold the model's own sign for the end of a turn")
        end = tokenizer.eos_token_id if closing is None else closing
        return [*ids, end] if end is not None else ids

    def sample(self, context: list[int]) -> list[int]:
        sampler = Sampler(
            self.net,
            self.encoder.tokenizer,
            max_new_tokens=self.config.max_new_tokens,
            temperature=self.config.temperature,
            reuse_cache=False,
            token_budget=self.config.token_budget,
        )
        return sampler([0], [context])[0]

    def write(self, trajectory, template: str | None) -> tuple[Skills | None, dict[str, float]]:
        config = self.config
        write = model_writer(
            self.net,
            self.encoder,
            max_new_tokens=config.skill_tokens,
            temperature=config.skill_temperature,
            context_limit=config.skill_context_limit or config.context_limit,
            prefill=config.skill_prefill,
            rollout_budget=config.rollout_budget,
            token_budget=config.token_budget,
        )
        skills, metrics = write_skills([trajectory], write, max_step_skills=config.max_step_skills, template=template)
        return skills[0], metrics

    def unknown(self, text: str) -> list[str]:
        """The words that the model cannot read."""
        tokenizer, blank = self.encoder.tokenizer, self.encoder.tokenizer.unk_token_id
        ids = {word: tokenizer(word, add_special_tokens=False)["input_ids"] for word in text.split()}
        return [word for word, own in ids.items() if blank is not None and blank in own]


def expert(config: Config, env: Any, episode: Episode) -> str:
    """The next command of the environment's expert. Raises ValueError where there is none."""
    if config.env == "alfworld":
        if not isinstance(env.engine, FastEngine):
            raise ValueError("the expert needs --env-options engine=fast")
        first = shortest_plan(env.engine)[0]  # it knows where everything is, whatever was done so far
        return next(command for command, own in env.commands.items() if own == first)
    if config.env == "webshop" and config.prompt != "compact":
        raise ValueError("the expert reads --prompt compact alone")
    if config.env not in ("search", "webshop"):
        raise ValueError(f"--env {config.env} has no expert")
    module = script(config.env)
    adviser = module.Adviser(Random(0)) if config.env == "search" else module.Adviser()
    adviser.reset(episode.trajectory.task)
    for step in episode.trajectory.steps:  # what it has read so far; it knows nothing else
        adviser.advise(step.observation)
        adviser.command = step.action
    return adviser.advise(episode.observation)


# ---- on the screen ---------------------------------------------------------------------------------------------------


def width() -> int:
    return max(NARROWEST, shutil.get_terminal_size().columns)


def say(text: str = "", indent: str = "") -> None:
    """One paragraph. Texts from outside lose what would move the cursor."""
    text = one_line(text, len(text))
    wrapped = textwrap.wrap(text, width() - len(indent) - 1, break_on_hyphens=False)  # a flag stays whole
    print("\n".join(indent + line for line in wrapped))


def chance(logprob: float) -> str:
    p = math.exp(logprob)
    return f"{p:.3f}" if p >= 0.0005 else f"{p:.0e}"


def signed(shift: float) -> str:
    """No minus in front of a zero, whose sign is rounding's alone."""
    return f"{round(shift, 2) + 0.0:+.2f}"


def colours() -> bool:
    return sys.stdout.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


def painted(text: str, shift: float) -> str:
    """Blue for praise, orange for blame, the deeper the stronger; plain where there is no colour, or nothing to say."""
    if not colours() or abs(shift) < 0.005:
        return text
    back, letters = (BLUE if shift > 0 else ORANGE)[min(4, int(5 * abs(shift) / FULL))]
    return f"\x1b[48;5;{back};38;5;{letters}m{text}\x1b[0m"


def show_tokens(tokens: list[str], shifts: list[float]) -> None:
    """Each token above its A_skill, in as many lines as the window needs."""
    lines, used = [[]], 0
    for token, shift in zip(tokens, shifts, strict=True):
        size = max(len(token), len(signed(shift)))
        if lines[-1] and used + size + 1 > width() - 5:
            lines.append([])
            used = 0
        lines[-1].append((token.rjust(size), signed(shift).rjust(size), shift))
        used += size + 1
    for line in lines:
        print("    " + " ".join(painted(token, shift) for token, _, shift in line))
        print("    " + " ".join(number for _, number, _ in line))


def show_table(names: list[str], scores: Tensor, numbers: list[str]) -> None:
    """A line per command: log-probs `scores` (columns, commands), the first column without a skill."""
    room = max(8, width() - 6 - 17 * len(scores))
    names = [one_line(name) for name in names]
    size = min(room, max(map(len, names)))
    head = "".join(f"{'with skill':>12}{'nats':>8}" for _ in scores[1:])
    print(f"{'':>4}{'':<{size}}{'chance':>8}{head}")
    for name, number, column in zip(names, numbers, scores.T.tolist(), strict=True):
        short = name if len(name) <= size else name[: size - 2] + ".."
        moved = "".join(f"{chance(one):>12}{signed(one - column[0]):>8}" for one in column[1:])
        print(f"{number:>3} {short:<{size}}{chance(column[0]):>8}{moved}")


# ---- one episode -----------------------------------------------------------------------------------------------------


class Answer(NamedTuple):
    command: str  # as it is shown
    text: str  # as the environment reads it, less what the template begins
    ids: list[int]


@dataclass
class Table:
    """One episode, and the person who plays it."""

    model: Model
    env: Guarded
    episode: Episode
    own: Skills = field(default_factory=lambda: Skills("", "", {}))  # the skills that were typed
    over: str = ""  # how the episode ended
    context: list[int] = field(default_factory=list)  # h of the coming turn
    answers: list[Answer] = field(default_factory=list)  # those that have a number
    scores: Tensor = field(default_factory=lambda: torch.zeros(1, 0))  # (columns, answers) log p

    @property
    def words(self) -> dict[str, Callable[..., None]]:
        """What can be typed. Those that take a text are methods of one parameter."""
        return {
            "help": self.help,
            "list": self.show,
            "sample": self.sample,
            "expert": self.expert,
            "try": self.attempt,
            "do": self.play,
            "skill": self.skill,
            "hint": self.hint,
            "prompt": self.prompt,
            "write": self.write,
        }

    @property
    def t(self) -> int:
        return len(self.episode.trajectory.steps)

    # ---- a turn ----

    def begin(self) -> None:
        """The coming turn: what there is to see, and what the model makes of it."""
        limit = self.model.config.context_limit
        self.context = self.episode.context(self.model.encoder)
        if self.env.failed:
            return self.end("the game itself failed")
        if len(self.context) + self.model.config.max_new_tokens > limit:
            return self.end(f"the next prompt has {len(self.context)} tokens, too many for --context-limit {limit}")
        if self.t == 0:
            self.warn()
        print()
        say(f"step {self.t + 1} of {self.env.env.max_steps}. You see:")
        say(self.episode.observation or "(nothing)", "  ")
        listed = [command for command in self.episode.admissible if not PLACEHOLDER.search(command)]
        spelled = [(command, text) for command in listed if (text := self.spelled(command)) is not None]
        self.answers = [Answer(command, text, self.model.response(text)) for command, text in spelled]
        if self.t == 0 and self.answers:
            self.tell_tags(self.answers[0])
        if not self.episode.admissible:
            self.answers = [self.drawn()]
        self.score()

    def warn(self) -> None:
        """Of a model that was made for other words."""
        blanks = self.context.count(self.model.encoder.tokenizer.unk_token_id) / len(self.context)
        acted = {"rollout/cut_off": 0.0, "rollout/unknown_tokens": blanks, "rollout/valid_actions": 1.0}
        for words in misfits(self.model.config, acted).values():
            say(f"WARNING: {words}")

    def drawn(self) -> Answer:
        """What the model would answer, sampled without a skill."""
        ids = self.model.sample(self.context)
        text = self.model.encoder.decode(ids)
        return Answer(text, text, ids)

    def score(self) -> None:
        """The likeliest first, without a skill and with it."""
        if self.answers:
            scores = self.sums(self.answers)
            order = scores[0].argsort(descending=True, stable=True)
            self.answers, self.scores = [self.answers[i] for i in order], scores[:, order]
        self.show(SHOWN)

    def show(self, most: int | None = None) -> None:
        """The commands in a table."""
        if not self.live():
            return
        for guidance in self.guidances():
            say(f"With your {'hint' if guidance.level == 'step' else 'skill'}: {guidance.text}")
        if not self.episode.admissible:
            say("The model suggests (`sample` plays it):")
        if self.answers:
            names, numbers = [answer.command for answer in self.answers], range(1, len(self.answers) + 1)
            show_table(names[:most], self.scores[:, :most], list(map(str, numbers))[:most])
        if most and len(self.answers) > most:
            print(f"and {len(self.answers) - most} more: `list`")
        if self.episode.admissible and self.answers:
            shares = ", with skill ".join(map(chance, self.scores.logsumexp(1).tolist()))
            say(f"All commands together: {shares}. The rest is for answers that are no command here.")
        if free := [command for command in self.episode.admissible if PLACEHOLDER.search(command)]:
            say(f"You can also type {', '.join(free)}, with words of your own.")

    def guidances(self) -> tuple[Guidance, ...]:
        """The typed skills that guide the coming turn, as --routing has it."""
        return () if self.over else route(self.coming(), self.own, self.model.config.routing)[self.t]

    def coming(self):
        """The trajectory with the coming turn at its end, which has no answer yet."""
        now = Step(self.episode.prompts[-1], self.episode.observation, self.context, [], "", "", True)
        return replace(self.episode.trajectory, steps=[*self.episode.trajectory.steps, now])

    def contexts(self) -> list[list[int]]:
        """h, and h^ with each skill that guides the turn. Raises ValueError where a skill has no room or no place."""
        coming, encoder, config = self.coming(), self.model.encoder, self.model.config
        found = [skill_context(encoder, coming, self.t, guidance) for guidance in self.guidances()]
        if any(len(context) + config.max_new_tokens > config.context_limit for context in found):
            raise ValueError(f"the skill does not fit into --context-limit {config.context_limit}, and is left out")
        return [self.context, *found]

    def sums(self, answers: list[Answer]) -> Tensor:
        """log p of whole answers: the sum over their tokens. -> (columns, answers)"""
        try:
            contexts = self.contexts()
        except ValueError as error:
            say(f"{error}.")
            self.own = Skills("", "", {t: text for t, text in self.own.steps.items() if t < self.t})
            contexts = [self.context]
        rows, responses = [context for context in contexts for _ in answers], [answer.ids for answer in answers]
        scores = self.model.logprobs(rows, responses * len(contexts))  # (columns * answers, R)
        return scores.nansum(1).view(len(contexts), len(answers))

    def spelled(self, command: str) -> str | None:
        """The answer that the environment reads as this command: bare, or in tags after a thought that is empty."""
        began, (verb, _, rest) = self.model.encoder.began, command.partition(" ")
        thought = "</think>" if "<think>" in began else "<think></think>"
        for text in (command, f"{thought}<action>{command}</action>", f"{thought}<{verb}>{rest}</{verb}>"):
            if self.env.parse_action(began + text, self.episode.admissible)[1]:
                return text
        return None

    # ---- what can be typed ----

    def hear(self, line: str) -> None:
        """One line that was typed."""
        line = one_line(line, len(line))
        word, _, text = line.partition(" ")
        if not line:
            say("Type a command or its number. `help` lists what else there is.")
        elif word in ("try", "do", "skill", "hint"):
            self.words[word](text)
        elif line in self.words:
            self.words[word]()
        elif not self.over and line.isdecimal() and 0 < int(line) <= len(self.answers):
            self.take(self.answers[int(line) - 1])
        else:
            self.play(line)

    def help(self) -> None:
        say("Type a command, its number, or one of these words:")
        for word, meaning in WORDS.items():
            print(textwrap.fill(f"{word:<12}{meaning}", width() - 1, subsequent_indent=" " * 12))
        say("The chance of a command is the product of its tokens' probabilities, the end of the turn included.")
        say("The last column is the change of its logarithm, in nats: 0.69 is twice as likely, -0.69 half as likely.")

    def sample(self) -> None:
        if self.live():
            self.take(self.drawn() if self.episode.admissible else self.answers[0], "the model")

    def expert(self) -> None:
        if self.live():
            try:
                say(f"the expert: {expert(self.model.config, self.env.env, self.episode)}")
            except ValueError as error:
                say(f"No advice: {error}.")

    def attempt(self, command: str) -> None:
        if answer := self.read(command):
            show_table([command], self.sums([answer]), [""])

    def play(self, command: str) -> None:
        if answer := self.read(command):
            self.take(answer)

    def skill(self, text: str) -> None:
        self.note(text)
        self.own = replace(self.own, episode=text)
        if not self.over:
            self.score()
        elif text and self.played():
            self.judge(Skills("", text))

    def hint(self, text: str) -> None:
        if self.live():
            self.note(text)
            self.own = replace(self.own, steps=self.own.steps | {self.t: text})
            self.score()

    def prompt(self) -> None:
        if self.live():
            for name, context in zip(("", *self.guidances()), self.contexts(), strict=True):
                print(f"With the {name.level} skill:" if name else "Without a skill:")
                say(self.model.encoder.tokenizer.decode(context), "  ")

    def live(self) -> bool:
        if self.over:
            say("The episode is over: `write`, `skill TEXT`, `new` or `quit`.")
        return not self.over

    def note(self, text: str) -> None:
        if unknown := self.model.unknown(text):
            say(f"The model does not know {', '.join(unknown)}: it reads {'them' if unknown[1:] else 'it'} as a blank.")

    def read(self, command: str) -> Answer | None:
        """The answer that says `command`; None, and a line that says why, where there is none."""
        if not self.live():
            return None
        if not command:
            return say("Which command? Such as: try look")
        verbs = {re.split(r"[\s\[]", known)[0] for known in self.episode.admissible}
        text = self.spelled(command)
        if text is None or (verbs and re.split(r"[\s\[]", command)[0] not in verbs):
            words = [word.split()[0] for word in WORDS]
            near = get_close_matches(command, [*(answer.command for answer in self.answers), *words], 1)
            meant = f" Did you mean {near[0]}?" if near else ""
            say(f"{command} is no command here.{meant} `list` has all commands, `help` the other words.")
            return None
        self.note(command)
        try:
            answer = Answer(command, text, self.model.response(text))
        except ValueError as error:
            return say(f"{error}.")
        if not self.episode.admissible:
            self.tell_tags(answer)
        return answer

    def tell_tags(self, answer: Answer) -> None:
        if answer.text != answer.command:
            say(f"{answer.command} is scored as the answer {answer.text}")

    def take(self, answer: Answer, who: str = "you") -> None:
        """Play one answer."""
        plain, *under = self.sums([answer])[:, 0].tolist()
        moved = "".join(f", with skill {chance(one)} ({signed(one - plain)} nats)" for one in under)
        say(f"{who}: {answer.command} (chance {chance(plain)}{moved})")
        self.episode.act(self.context, answer.ids, self.model.encoder.began + answer.text, None)
        if self.env.failed:
            return self.end("the game itself failed")
        if not self.episode.trajectory.steps[-1].valid:
            say("That was no command here, and a step is gone.")
        if not self.episode.done:
            return self.begin()
        if self.episode.observation:
            say(self.episode.observation, "  ")
        won = self.episode.trajectory.success
        self.end(f"{'won' if won else 'lost'} after {self.t} step{'s' if self.t > 1 else ''}")

    def end(self, how: str) -> None:
        self.over = how
        say(f"The episode is over: {how}. `write` lets the model write skills about it, `new` starts the next game.")

    # ---- praise and blame ----

    def write(self) -> None:
        if not self.over:
            return say("The episode is not over yet: skills are written in hindsight.")
        if not self.played():
            return
        skills, metrics = self.model.write(self.episode.trajectory, self.env.env.analysis_prompt())
        if skills is None:
            too_long = metrics["skills/too_long"]
            why = "the episode is too long for --context-limit" if too_long else "its answer could not be read, twice"
            return say(f"The model wrote no skills: {why}. `write` asks again.")
        say(f"episode skill: {skills.episode}")
        for t, text in skills.steps.items():
            say(f"step skill {t + 1}: {text}")
        self.judge(skills)

    def played(self) -> bool:
        """Whether there is anything to judge: a game that failed is left out in training, too."""
        there = self.t > 0 and not self.env.failed
        if not there:
            say("Nothing was played that could be learnt from. `new` starts the next game.")
        return there

    def judge(self, skills: Skills) -> None:
        """A_skill of every token of the answers that were given."""
        model, trajectory = self.model, self.episode.trajectory
        path = route(trajectory, skills, model.config.routing)
        h, y = [step.context for step in trajectory.steps], [step.response for step in trajectory.steps]
        old, limit = model.logprobs(h, y), model.config.context_limit  # (B, R) log pi(y | h)
        shifts = {}
        for level in LEVELS:
            contexts, too_long = skill_contexts(model.encoder, [trajectory], [path], level, limit)
            shifts[level] = skill_advantage(model.logprobs(contexts, y), old, ~old.isnan())  # (B, R)
            if too_long:
                say(f"{too_long} steps have no room for the {level} skill: --context-limit {limit}")
        print()
        say("A_skill of each word: above 0 the skill makes it likelier (praise), below 0 less likely (blame), in nats.")
        if colours():
            print(f"Praise is {painted('blue', FULL)}, blame is {painted('orange', -FULL)}, deepest at {FULL:g} nats.")
        for t, (step, guidances) in enumerate(zip(trajectory.steps, path, strict=True)):
            for guidance in guidances:
                shift = shifts[guidance.level][t, : len(step.response)].tolist()
                say(f"step {t + 1}, {guidance.level} skill, in all {signed(sum(shift))}:")
                tokens = [model.encoder.tokenizer.decode([token]).replace("\n", "\\n") for token in step.response]
                show_tokens([one_line(token) or "_" for token in tokens], shift)


def visit(config: Config, number: int) -> None:
    """Game after game, until somebody has had enough. Raises ValueError where there is no such game."""
    split = [*eval_splits(config), "train"][0]
    games = games_of(replace(config, eval_games=max(number, 0) + SITTING), split)
    if not 0 <= number < len(games):
        raise ValueError(f"--game {number}: {config.env} has {len(games)} games in {split}, counted from 0")
    model = Model.load(config)
    while True:
        torch.manual_seed(config.seed)
        with Guard(environment(config), 1, 1) as guard:
            env = guard.env()
            table = Table(model, env, Episode.start(env, games[number], 0))
            say(f"game {number}. Your task: {table.episode.trajectory.task}")
            say("`help` lists what you can type.")
            table.begin()
            while (line := input("> ").strip()) not in ("new", "quit"):
                table.hear(line)
        if line == "quit":
            raise EOFError
        number = (number + 1) % len(games)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--game", type=int, default=0, metavar="N", help="which held-out game comes first, from 0")
    args, flags = parser.parse_known_args(argv)
    with suppress(ImportError):
        import readline  # noqa: F401  # the arrow keys; Windows has none
    for stream in (sys.stdin, sys.stdout):
        with suppress(AttributeError):
            stream.reconfigure(errors="replace")  # a letter that a terminal lacks is no reason to stop
    with lm.one_line("play.py"):
        config = parse_args(flags, program="play.py")
        device, half = device_of(config.device), config.mixed_precision == "bf16"
        try:
            with torch.autocast(device.type, torch.bfloat16, enabled=half):
                visit(config, args.game)
        except (EOFError, KeyboardInterrupt):
            print("\nThat was all. Nothing was saved.")


if __name__ == "__main__":
    main()
