"""One flat, typed config. The command line, the recipes and `--help` are all made from it."""

from __future__ import annotations

import argparse
import re
import tomllib
import types
import typing
from dataclasses import asdict, dataclass, field, fields
from importlib.util import find_spec
from pathlib import Path

from baselines import METHODS
from data import Level, Skills
from envs import ENVIRONMENTS, new_words, read_options
from lm.precision import mixed_precision
from lm.writers import import_writer
from router import RULES, asks_for, route
from tiny.coldstart import PREFIX

POSITIVE = (
    *("iterations", "tasks", "rollouts", "max_steps", "max_new_tokens", "context_limit", "skill_tokens", "epochs"),
    *("token_budget", "rollout_budget", "train_games", "eval_games", "save_every", "keep_checkpoints", "sample_every"),
    *("skill_context_limit", "temperature", "learning_rate", "max_grad_norm", "kl_clip", "skill_clip"),
)
NOT_NEGATIVE = (
    *("warmup", "kl", "clip", "mini_batch", "lora_rank", "max_step_skills", "eval_every", "history", "lr_halving"),
    *("eval_temperature", "skill_temperature", "invalid_penalty", "weight_decay", "skill_iterations"),
    *("state_weight", "gate_beta", "rlsd_clip", "rlsd_iterations", "distill_weight", "top_k"),
)
SHARES = ("gamma", "rlsd_mix", "ema_decay", "jsd_beta")  # between 0 and 1

LOCAL_WRITERS = ("policy", "reference", "ema")
RECIPES = Path(__file__).parent / "recipes"


def group(title: str):
    """-> a function that makes a setting of that group of `--help`."""

    def setting(default, help: str, choices=None):
        told = {"help": help, "choices": choices, "group": title}
        if isinstance(default, dict):  # each Config its own
            return field(default_factory=lambda: dict(default), metadata=told)
        return field(default=default, metadata=told)

    return setting


FIRST = group("what you change first")
ROLLOUT = group("1. rollout (rollout.py)")
SKILLS = group("2. skills (skills.py)")
ROUTING = group("3. routing (router.py)")
SCORES = group("4. re-scoring (rescore.py)")
ADVANTAGE = group("5. advantage (advantage.py)")
UPDATE = group("6. update (train.py)")
ENV = group("environment (envs/)")
MODEL = group("model")
RUN = group("run folder and evaluation")
OTHERS = group("other methods (baselines/): each is read only with the --algo that it names")


@dataclass
class Config:
    """Defaults are the laptop run; recipes/*.toml hold the paper's settings. Units stand in each setting's help."""

    algo: str = FIRST("opid", "training method", tuple(METHODS))
    env: str = FIRST("alfworld", "environment", ENVIRONMENTS)
    model: str = FIRST("tiny", "'tiny', 'smollm2', a folder or a hub id; with cold: in front after its cold start")
    iterations: int = FIRST(60, "training iterations")
    tasks: int = FIRST(16, "tasks per iteration")
    rollouts: int = FIRST(8, "rollouts per task (N)")
    max_steps: int = FIRST(20, "most steps per episode")
    learning_rate: float = FIRST(3e-4, "AdamW's peak learning rate")
    episode_weight: float = FIRST(0.1, "lambda_ep: weight of A_skill on episode-guided tokens (paper: 0.001)")
    step_weight: float = FIRST(0.1, "lambda_step: weight of A_skill on step-guided tokens (paper: 0.001)")
    seed: int = FIRST(0, "seed of everything random")
    out: str = FIRST("runs/opid", "run folder")
    resume: bool = FIRST(False, "go on from the newest checkpoint in --out")
    plan: bool = FIRST(False, "print the estimated peak memory of this run, without loading weights, and exit")

    context: str = ROLLOUT("chat", "each step a growing conversation, or a prompt of its own", ("chat", "window"))
    context_limit: int = ROLLOUT(1024, "most tokens of prompt and response together")
    max_new_tokens: int = ROLLOUT(12, "most tokens of a response")
    temperature: float = ROLLOUT(1.0, "sampling temperature of training rollouts")
    reuse_cache: bool = ROLLOUT(
        True, "keep keys and values from turn to turn where a model's architecture makes that exact; off: read anew"
    )
    rollout_budget: int = ROLLOUT(
        32768,
        "most rows x length of what is sampled at a time, in rollouts, evaluation and skill writing: it bounds their "
        "memory. Episodes beyond it wait",
    )
    success_reward: float = ROLLOUT(10.0, "outcome reward of a solved task")
    # 0, not the paper's 0.1: in a group whose outcomes are all equal the penalty alone is what gets normalised, to the
    # same size as a real outcome, and for small models with many invalid actions that noise makes training collapse.
    invalid_penalty: float = ROLLOUT(0.0, "taken off a step's return for an invalid action (paper: 0.1)")

    skill_writer: str = SKILLS(
        "policy", "who writes: policy (paper), reference, ema, openai, or your own function as package.module:function"
    )
    max_step_skills: int = SKILLS(5, "K: most step skills per trajectory")
    skill_tokens: int = SKILLS(96, "most tokens of a skill answer")
    skill_context_limit: int | None = SKILLS(None, "most tokens of transcript and answer; none: --context-limit")
    skill_temperature: float = SKILLS(1.0, "temperature of skill writing; 0: greedy")
    skill_prefill: str = SKILLS("", "text that starts every skill answer of a local model, such as '{'")
    openai_base_url: str | None = SKILLS(None, "endpoint for --skill-writer openai; none: the library's default")
    openai_model: str | None = SKILLS(None, "model name for --skill-writer openai (key: OPENAI_API_KEY)")

    routing: str = ROUTING("critical-first", "which skill guides a step", tuple(RULES))

    # Not the paper's `old`: at laptop scale the scorer that follows the policy rises and then falls with it
    # (docs/results_before.md); the frozen one cannot drift.
    scorer: str = SCORES(
        "reference", "the model that scores the skill-augmented context (paper: old)", ("old", "reference", "ema")
    )
    shift_base: str = SCORES(
        "old",
        "what the skill-augmented log-prob is compared with: the sampling policy's (paper), or the scorer's own, both "
        "of the plain context (the same with --scorer old); other: the scorer's under a skill of another task, so that "
        "what any skill does cancels",
        ("old", "scorer", "other"),
    )
    centred: bool = SCORES(False, "A_skill less what it is on average over the words that might have been sampled")
    ema_decay: float = SCORES(0.99, "decay per iteration of the EMA model, for --scorer ema, --skill-writer ema")
    token_budget: int = SCORES(4096, "most padded tokens of a forward pass (micro-batch), in the update too")

    normalize: str = ADVANTAGE("mean_std", "outcome advantage: group mean and std, or mean only", ("mean_std", "mean"))
    group_over: str = ADVANTAGE("steps", "what group statistics are taken over", ("steps", "trajectories"))
    skill_iterations: int = ADVANTAGE(0, "iterations in which both lambdas fall to 0, in a line; 0: they stay (paper)")
    skill_clip: float | None = ADVANTAGE(None, "bound of |A_skill| per token, in nats; none: unbounded (paper)")

    clip: float = UPDATE(0.2, "PPO clip range of the token ratio")
    dual_clip: float | None = UPDATE(
        None, "c: bound c |A| of the loss of a token with A < 0 (release: 3); none: unbounded"
    )
    kl: float = UPDATE(0.01, "beta: weight of KL(pi || reference), k3 estimator; 0: no reference pass")
    kl_clip: float | None = UPDATE(None, "the most that a token's k3 counts, in nats (release: 10); none: unbounded")
    epochs: int = UPDATE(1, "passes over an iteration's batch")
    mini_batch: int = UPDATE(512, "step samples per gradient step; 0: all of the iteration")
    warmup: int = UPDATE(0, "iterations of linear warm-up")
    lr_halving: int = UPDATE(20, "iterations in which the learning rate halves; 0: constant (paper)")
    weight_decay: float = UPDATE(0.01, "AdamW's weight decay")
    max_grad_norm: float = UPDATE(1.0, "gradient clipping, L2 norm")

    env_options: dict[str, str] = ENV(  # noqa: RUF009
        {},
        "the environment's own options. alfworld: engine=fast|textworld, data=generate or the official games' folder, "
        "size=small|full of generated rooms. webshop: data=generate or the official files' folder, "
        "goals=human|synthetic. search: questions=generate, a file, folder or hub id, retriever=generate, a corpus "
        "file or http:// of a server",
    )
    train_games: int = ENV(1000, "generated training games")
    prompt: str = ENV("auto", "prompt style; auto: compact for tiny and cold: models", ("auto", "official", "compact"))
    history: int = ENV(5, "last steps shown in a 'window' prompt")

    dtype: str = MODEL("float32", "dtype of the parameters", ("float32", "bfloat16"))
    mixed_precision: str = MODEL(
        "no", "accelerate's autocast; auto: bf16 where the device multiplies in it", ("no", "bf16", "auto")
    )
    frozen_dtype: str = MODEL(
        "auto",
        "dtype of frozen models (reference, teacher); auto: bfloat16 for those weights that --mixed-precision bf16 "
        "rounds anyway, which changes no number",
        ("auto", "float32", "bfloat16"),
    )
    offload: bool = MODEL(False, "reference and optimizer state in host memory while they are not needed")
    shard: bool = MODEL(False, "weights, gradients, optimizer and frozen models split over all processes (FSDP2)")
    gradient_checkpointing: bool = MODEL(False, "recompute activations in the backward pass")
    lora_rank: int = MODEL(0, "rank of LoRA adapters on all linear layers (needs peft); 0: full fine-tuning")

    eval_every: int = RUN(10, "iterations between evaluations; 0: only at the end")
    eval_games: int = RUN(200, "games per split at evaluation, at most")
    eval_temperature: float = RUN(0.4, "sampling temperature of evaluation")
    save_every: int = RUN(10, "iterations between checkpoints")
    keep_checkpoints: int = RUN(2, "newest checkpoints to keep")
    sample_every: int = RUN(5, "iterations between samples.jsonl records")
    tracker: str = RUN("none", "accelerate tracker beside metrics.jsonl", ("none", "tensorboard", "wandb"))

    distill_weight: float | None = OTHERS(
        None,
        "sdar, opsd, grpo+opsd, skill-sd: weight c of their loss term; none: the release's 0.01, of skill-sd 0.001",
    )
    gate_beta: float = OTHERS(5.0, "sdar, opsd: steepness of the gate sigmoid(beta Delta), per nat")
    state_weight: float = OTHERS(1.0, "gigpo: weight of the step-relative advantage")
    gamma: float = OTHERS(0.95, "gigpo: discount per step of the return that state groups compare")
    rlsd_mix: float = OTHERS(0.5, "rlsd: mu, how far Delta rescales A_ep at first, 0 to 1")
    rlsd_iterations: int = OTHERS(50, "rlsd: iterations in which mu falls to 0 (the release: 100); 0: it stays")
    rlsd_clip: float = OTHERS(0.2, "rlsd: bound of the rescaling, 1 - eps to 1 + eps")
    divergence: str = OTHERS(
        "sampled",
        "opid, opd: what draws the policy to scorer or teacher: the shift of sampled tokens (paper), or exactly, as a "
        "loss, the reverse or forward KL or generalised JSD of whole distributions",
        ("sampled", "reverse", "forward", "jsd"),
    )
    jsd_beta: float = OTHERS(0.5, "jsd: beta, from near 0 (forward KL's direction) to near 1 (reverse KL's)")
    top_k: int = OTHERS(0, "--divergence: over the k likeliest words alone; 0: over all")
    top_k_of: str = OTHERS("teacher", "--top-k: whose likeliest words", ("teacher", "student"))
    top_k_rest: str = OTHERS(
        "bin",
        "--top-k: what becomes of the other words: one bin, left out, or left out with the weights held (reverse)",
        ("bin", "drop", "hold"),
    )
    oprd_layers: str = OTHERS(
        "all", "oprd: layers whose states are matched; even: the first, third, ...", ("last", "all", "even", "odd")
    )
    oprd_positions: str = OTHERS("all", "oprd: tokens of a response that count: all, first-K or last-K, as in last-32")
    oprd_normalize: bool = OTHERS(
        False, "oprd: states of length 1 (the release), not as they are (the paper's numbers)"
    )
    oprd_weight: float = OTHERS(1.0, "oprd: weight of the loss (the release: 1)")
    teacher: str | None = OTHERS(
        None,
        "opd, oprd: the larger model, named as --model is; it must have the same tokenizer. oprd without one: the "
        "scorer under the skill",
    )

    def __post_init__(self):
        """Raises ValueError for a value out of range or an impossible combination, before any model is loaded."""
        self._check_values()
        if self.prompt == "auto":
            self.prompt = "compact" if self.model == "tiny" or self.model.startswith(PREFIX) else "official"
        self.mixed_precision = mixed_precision(self.mixed_precision)
        if self.model.startswith(PREFIX) and (self.prompt, self.context) != ("compact", "chat"):
            raise ValueError(
                f"--model {self.model} knows --prompt compact and --context chat: for others run tools/coldstart.py "
                "with them, and give its folder to --model"
            )
        read_options(self.env, self.env_options)
        if self.model == "tiny" and (unknown := new_words(self.env, self.env_options)):
            raise ValueError(f"--model tiny knows only the words of generated {self.env} data: no other {unknown[0]}")
        if self.max_new_tokens >= self.context_limit:
            raise ValueError("--max-new-tokens leaves no room for a prompt in --context-limit")
        if self.dual_clip is not None and self.dual_clip <= 1 + self.clip:
            raise ValueError("--dual-clip must be above 1 + --clip: it bounds what PPO-clip leaves unbounded")
        if self.exchanges and self.tasks < 2:
            raise ValueError(f"{self.exchanges} takes skills from other tasks: --tasks must be at least 2")
        if self.offload and self.shard:
            raise ValueError("--offload is for one card: with --shard every card holds its part of all of it")
        if self.teacher is not None and self.algo not in ("opd", "oprd"):
            raise ValueError("--teacher is for opd and oprd")
        if not re.fullmatch(r"all|(first|last)-[1-9]\d*", self.oprd_positions):
            raise ValueError(f"--oprd-positions must be all, first-K or last-K, not {self.oprd_positions!r}")
        self._check_divergence()
        self._check_writer()
        method = METHODS[self.algo]
        method.check(self)
        if self.shift_base == "other" and not method.own_skills:
            raise ValueError(
                f"--shift-base other compares with another task's skill: --algo {self.algo} has no own ones"
            )
        for name in method.idle:
            if getattr(self, name) != getattr(Config, name):
                raise ValueError(f"--algo {self.algo} does not use A_skill as OPID does: {flag(name)} would do nothing")
        self._check_routing()

    def _check_routing(self) -> None:
        seen = {"success": True, "logprobs": [[-1.0], [-1.0]]}
        steps = {0: "at one step"} if self.max_step_skills else {}
        asked = route(Skills("", "both levels", steps), 2, self.routing, levels=self.levels, **seen)
        if self.levels and not any(asked) and not any(asks_for(self.routing, name) for name in seen):
            few = "" if self.max_step_skills else " and --max-step-skills 0"
            raise ValueError(f"--routing {self.routing} guides no step with these weights{few}: use --algo grpo")
        METHODS[self.algo](self).check_routes([asked])

    def _check_values(self) -> None:
        hints = typing.get_type_hints(Config)
        for f in fields(self):
            value, choices = getattr(self, f.name), f.metadata["choices"]
            if choices and value not in choices:
                raise ValueError(f"{flag(f.name)} must be one of {', '.join(choices)}, not {value!r}")
            if not _is_of(value, hints[f.name]):
                raise ValueError(f"{flag(f.name)} must be {f.type}, not {value!r}")
            if isinstance(value, int) and hints[f.name] in (float, float | None):
                setattr(self, f.name, float(value))  # TOML and Python write 1: a tensor of it would round all to ints
        for name in POSITIVE:
            if getattr(self, name) is not None and getattr(self, name) <= 0:
                raise ValueError(f"{flag(name)} must be positive, not {getattr(self, name)}")
        for name in NOT_NEGATIVE:
            if (getattr(self, name) or 0) < 0:
                raise ValueError(f"{flag(name)} must not be negative")
        for name in SHARES:
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{flag(name)} must be between 0 and 1, not {getattr(self, name)}")

    def _check_divergence(self) -> None:
        if self.divergence == "sampled":
            if self.top_k:
                raise ValueError("--top-k is for --divergence reverse, forward or jsd: a sampled shift has one word")
            return
        if not METHODS[self.algo].whole:
            raise ValueError(f"--divergence is for opid and opd: --algo {self.algo} has no shift that it could replace")
        if self.shift_base != "old" or self.centred or self.skill_clip is not None:
            raise ValueError(
                f"--divergence {self.divergence} is exact: --shift-base, --centred, --skill-clip are for samples"
            )
        if self.shard:
            raise ValueError(f"--divergence {self.divergence} needs the teacher's output layer whole: no --shard")
        if self.divergence == "jsd" and self.jsd_beta in (0, 1):
            raise ValueError("--jsd-beta 0 and 1 measure nothing: take --divergence forward or reverse")
        if self.top_k_rest == "hold" and (self.divergence, bool(self.top_k)) != ("reverse", True):
            raise ValueError("--top-k-rest hold is for --divergence reverse with --top-k")

    def _check_writer(self) -> None:
        if not self.writes_skills:
            return
        if self.skill_writer == "openai" and not self.openai_model:
            raise ValueError("--skill-writer openai needs --openai-model")
        if ":" in self.skill_writer:
            import_writer(self.skill_writer)
        elif self.skill_writer not in (*LOCAL_WRITERS, "openai"):
            raise ValueError(
                f"--skill-writer must be one of {', '.join(LOCAL_WRITERS)}, openai or package.module:function, "
                f"not {self.skill_writer!r}"
            )
        room = "context_limit" if self.skill_context_limit is None else "skill_context_limit"
        if self.skill_writer in LOCAL_WRITERS and self.skill_tokens >= getattr(self, room):
            raise ValueError(f"--skill-tokens leaves no room for a transcript in {flag(room)}")

    def check_trainable(self) -> None:
        """Raises ValueError for what would train on wrong numbers, or not do what was asked."""
        if self.dtype == "bfloat16" and not self.lora_rank:
            raise ValueError(
                "--dtype bfloat16 rounds most updates of a small learning rate away: full fine-tuning needs --dtype "
                "float32 (with --mixed-precision bf16 the products are in bfloat16 all the same), or --lora-rank"
            )
        needed = {"tensorboard": ("tensorboard", "tensorboardX"), "wandb": ("wandb",)}.get(self.tracker, ())
        if needed and not any(find_spec(name) for name in needed):
            raise ValueError(f"--tracker {self.tracker} needs its package: pip install {needed[0]}")

    @property
    def levels(self) -> tuple[Level, ...]:
        """The levels of skills that the policy's tokens are re-scored under; none: plain GRPO."""
        return METHODS[self.algo].levels(self)

    @property
    def exchanges(self) -> str | None:
        """The setting by which tasks exchange skills; None: they do not."""
        if METHODS[self.algo].needs_others:
            return f"--algo {self.algo}"
        return "--shift-base other" if self.levels and self.shift_base == "other" else None

    @property
    def needs_states(self) -> str | None:
        """The setting that needs whole distributions, hence hidden states; None: the sampled tokens are enough."""
        if self.divergence != "sampled":
            return f"--divergence {self.divergence}"
        return "--centred" if self.levels and self.centred else None

    @property
    def writes_skills(self) -> bool:
        return METHODS[self.algo].writes_skills(self)

    @property
    def budgets(self) -> dict[str, int]:
        """What bounds the memory of sampling."""
        return {"rollout_budget": self.rollout_budget, "token_budget": self.token_budget}

    @property
    def longest(self) -> int:
        """Tokens of the longest context that the policy, or a copy of it, may read."""
        writes = self.writes_skills and self.skill_writer in LOCAL_WRITERS
        return max(self.context_limit, (writes and self.skill_context_limit) or 0)

    @property
    def limits(self) -> dict[str, float]:
        """What scoring goes by: the temperature that was sampled at, and the bound of its memory."""
        return {"temperature": self.temperature, "token_budget": self.token_budget}

    @property
    def pulled(self) -> bool:
        """Whether the loss holds the KL term."""
        return self.kl > 0 and not METHODS[self.algo].matches_states

    def reads(self, name: str) -> bool:
        """Whether a run needs the frozen "reference", or the slow "ema", beside the policy."""
        pulls, scores = self.pulled and name == "reference", bool(self.levels) and self.scorer == name
        return pulls or scores or (self.writes_skills and self.skill_writer == name)

    def to_dict(self) -> dict:
        return asdict(self)


def changed(before: dict, now: dict) -> list[str]:
    """The settings of `now` that a run with the settings `before` did not have. Of a flag that came later it had the
    default."""
    had = Config().to_dict() | before
    return [name for name in now if had[name] != now[name]]


def flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _is_of(value, annotation) -> bool:
    if annotation == dict[str, str]:
        return isinstance(value, dict) and all(isinstance(item, str) for pair in value.items() for item in pair)
    kinds = typing.get_args(annotation) if isinstance(annotation, types.UnionType) else (annotation,)
    if isinstance(value, bool):
        return bool in kinds
    return isinstance(value, (*kinds, int) if float in kinds else kinds)


def _optional(kind: type):
    """Reads "none" as None, anything else as `kind`."""

    def read(text: str):
        return None if text == "none" else kind(text)

    read.__name__ = kind.__name__  # argparse names it in its error message
    return read


def read_recipe(name: str, above: tuple[str, ...] = ()) -> dict:
    """A recipe's settings, on top of those of the recipe that it names as its `base`: a name in recipes/ or a path to a
    .toml file. Raises ValueError for one that is not there, holds an unknown setting or is its own base."""
    path = Path(name) if name.endswith(".toml") else RECIPES / f"{name}.toml"
    if not path.is_file():
        known = ", ".join(sorted(p.stem for p in RECIPES.glob("*.toml")))
        raise ValueError(f"no recipe {name!r}; known: {known}, or a path to a .toml file")
    if name in above:
        raise ValueError(f"recipes are one another's base: {' -> '.join((*above, name))}")
    settings = tomllib.loads(path.read_text())
    base = read_recipe(settings.pop("base"), (*above, name)) if "base" in settings else {}
    unknown = settings.keys() - {f.name for f in fields(Config)}
    if unknown:
        raise ValueError(f"{path}: unknown settings {', '.join(sorted(unknown))}")
    return _over(base, settings)


def _over(below: dict, above: dict) -> dict:
    """Settings on top of others. Options of an environment are taken one by one, unless the environment is another."""
    merged = below | above
    if "env_options" in below and "env_options" in above and above.get("env", below.get("env")) == below.get("env"):
        merged["env_options"] = below["env_options"] | above["env_options"]
    elif "env" in above and above["env"] != below.get("env", "alfworld") and "env_options" not in above:
        merged["env_options"] = {}
    return merged


def _key_value(text: str) -> tuple[str, str]:
    key, sign, value = text.partition("=")
    if not (key and sign):
        raise argparse.ArgumentTypeError(f"{text!r} is not of the form key=value")
    return key, value


def parse_args(
    argv: list[str] | None = None,
    base: dict | None = None,
    *,
    program: str = "train.py",
    about: str = "OPID, On-Policy Skill Distillation for agentic RL, in plain PyTorch.",
    shown: tuple[str, ...] | None = None,  # settings that `--help` explains; None: all
) -> Config:
    """The command line -> Config. A flag overrides the recipe, which overrides `base`, which overrides the default.
    Exits with a clear message on an unknown flag, a bad value or an impossible combination."""
    parser = argparse.ArgumentParser(
        prog=program,
        description=about,
        allow_abbrev=False,
        usage=f"{program} [--recipe NAME] [flags]",
    )
    first = fields(Config)[0].metadata["group"]
    groups, hints = {first: parser.add_argument_group(first)}, typing.get_type_hints(Config)
    groups[first].add_argument("--recipe", help="settings to start from: a name in recipes/ or a .toml file")
    for f in fields(Config):
        title, hidden = f.metadata["group"], shown is not None and f.name not in shown
        if title not in groups:
            groups[title] = parser.add_argument_group(title)
        annotation = hints[f.name]
        if annotation == dict[str, str]:
            help = {"metavar": "KEY=VALUE", "default": argparse.SUPPRESS}
            help["help"] = argparse.SUPPRESS if hidden else f.metadata["help"]
            groups[title].add_argument(flag(f.name), nargs="*", type=_key_value, **help)
            continue
        kind = next(k for k in (*typing.get_args(annotation), annotation) if k in (str, int, float, bool))
        explained = argparse.SUPPRESS if hidden else f"{f.metadata['help']} (default: {f.default})"
        options: dict = {"default": argparse.SUPPRESS, "help": explained}
        if kind is bool:
            options["action"] = argparse.BooleanOptionalAction
        else:
            options["type"] = _optional(kind) if annotation is not kind else kind
            options["choices"] = f.metadata["choices"]
            options["metavar"] = None if f.metadata["choices"] else kind.__name__.upper()
        groups[title].add_argument(flag(f.name), **options)
    given = vars(parser.parse_args(argv))
    given |= {"env_options": dict(given["env_options"])} if "env_options" in given else {}
    try:
        recipe = given.pop("recipe", None)
        settings = _over(_over(base or {}, read_recipe(recipe) if recipe else {}), given)
        if older := settings.keys() - {f.name for f in fields(Config)}:
            raise ValueError(f"settings of another version: {', '.join(sorted(older))}; name them as flags instead")
        return Config(**settings)
    except ValueError as error:
        parser.error(str(error))
