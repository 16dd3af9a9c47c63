"""One flat, typed config. The command line, the recipes and `--help` are all made from it."""

from __future__ import annotations

import argparse
import math
import re
import tomllib
import types
import typing
from dataclasses import asdict, dataclass, field, fields
from difflib import get_close_matches
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

from data import Level
from envs import ENVIRONMENTS, new_words, read_options
from lm.loading import SAVED, about_policy
from lm.precision import mixed_precision
from lm.writers import import_writer
from router import LEVELS, RULES
from tiny.coldstart import PREFIX
from tiny.plays import TINY

POSITIVE = (
    *("iterations", "tasks", "rollouts", "max_steps", "max_new_tokens", "context_limit", "skill_tokens", "epochs"),
    *("token_budget", "rollout_budget", "train_games", "eval_games", "save_every", "keep_checkpoints", "sample_every"),
    *("skill_context_limit", "temperature", "learning_rate", "max_grad_norm", "kl_clip"),
)
NOT_NEGATIVE = (
    *("warmup", "kl", "clip", "mini_batch", "lora_rank", "max_step_skills", "eval_every", "history", "lr_halving"),
    *("eval_temperature", "skill_temperature", "invalid_penalty", "weight_decay", "success_reward"),
)

LOCAL_WRITERS = ("policy", "reference")
RECIPES, VARIANTS = Path(__file__).parent / "recipes", Path(__file__).parent / "variants"
OF_ITS_CARD = ("env_options", "mixed_precision", "gradient_checkpointing", "token_budget", "rollout_budget")
OFFICIAL_ANSWER = 24  # tokens: the tags of an official answer around a command, and hardly a thought

# What may differ between a run and its resumption. Anything else would make it another run. Among these are the flags
# that messages and docs recommend where memory, the context limit or a NaN gradient stopped a run.
FREE = {
    *("out", "resume", "plan", "iterations", "eval_every", "save_every", "keep_checkpoints", "sample_every", "tracker"),
    *("push", "strict", "device", "fit", "plan_for"),
    *("token_budget", "rollout_budget", "gradient_checkpointing", "offload", "shard", "context_limit"),
    *("skill_context_limit", "learning_rate", "max_grad_norm"),
    *("skills_may_fail", "openai_base_url"),  # where an endpoint is gone
}

# The settings that a saved policy keeps in opid.json, beside its weights: how it acts, and how it was evaluated.
ACTS = ("env", "env_options", "template_options", "prompt", "context", "history", "context_limit", "max_new_tokens")
ACTS += ("max_steps", "max_step_skills", "skill_tokens", "skill_context_limit", "skill_prefill")
EVALUATED = ("eval_games", "eval_temperature", "rollout_budget", "reuse_cache", "dtype", "mixed_precision", "seed")


def group(title: str):
    """-> a function that makes one setting, shown in this group of `--help`."""

    def setting(default, help: str, choices=None, bounds: tuple[float | None, float | None] = (None, None)):
        about = {"help": help, "choices": choices, "group": title, "bounds": bounds}
        if isinstance(default, dict):  # each Config its own
            return field(default_factory=lambda: dict(default), metadata=about)
        return field(default=default, metadata=about)

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
OWN = group("this --algo (variants/)")


@dataclass
class Config:
    """The defaults are the authors' ALFWorld run (examples/opid_trainer/run_alfworld_opid_guide.sh). What differs from
    it stands in recipes/*.toml, each line with its reason. Each setting's help says its unit."""

    algo: str = FIRST(
        "opid", "opid, grpo, another file of variants/, or package.module:NAME; its flags: --algo NAME --help"
    )
    env: str = FIRST("alfworld", "environment", ENVIRONMENTS)
    model: str = FIRST(
        "Qwen/Qwen2.5-3B-Instruct",
        "'tiny', 'smollm2', a folder or a hub id, of a model or of LoRA adapters; cold:NAME is NAME after its cold "
        "start. With neither --model nor --recipe the run is the laptop recipe",
    )
    iterations: int = FIRST(160, "training iterations")
    tasks: int = FIRST(16, "tasks per iteration")
    rollouts: int = FIRST(8, "rollouts per task (N)")
    max_steps: int = FIRST(30, "most steps per episode")
    learning_rate: float = FIRST(1e-6, "AdamW's peak learning rate")
    episode_weight: float = FIRST(0.001, "lambda_ep: weight of A_skill on episode-guided tokens")
    step_weight: float = FIRST(0.001, "lambda_step: weight of A_skill on step-guided tokens")
    seed: int = FIRST(0, "seed of everything random")
    out: str = FIRST("runs/opid", "run folder")
    resume: bool = FIRST(False, "go on from the newest checkpoint in --out")
    plan: bool = FIRST(False, "print this run's estimated peak memory and hours, without loading weights, and exit")
    plan_for: str | None = FIRST(None, "print the plan for another card, by its name, such as 'RTX 4090', or its GiB")

    context: str = ROLLOUT(
        "window", "chat: one growing conversation; window: each step is a prompt of its own", ("chat", "window")
    )
    context_limit: int = ROLLOUT(2560, "most tokens of prompt and response together (2048 and 512)")
    max_new_tokens: int = ROLLOUT(512, "most tokens of a response")
    temperature: float = ROLLOUT(1.0, "sampling temperature of training rollouts")
    reuse_cache: bool = ROLLOUT(
        True, "keep keys and values from turn to turn where the model allows it exactly; off: read each context anew"
    )
    rollout_budget: int = ROLLOUT(
        262144,
        "most rows x length sampled at a time, in rollouts, evaluation and skill writing. It bounds their memory; "
        "further episodes wait",
    )
    success_reward: float = ROLLOUT(10.0, "outcome reward of a solved task")
    invalid_penalty: float = ROLLOUT(0.1, "taken off a step's return for an invalid action")

    skill_writer: str = SKILLS(
        "policy",
        "who writes: policy, reference, openai (as the released code does), or your own function as "
        "package.module:function",
    )
    skills_may_fail: bool = SKILLS(
        False, "go on without the skills of a batch whose endpoint or function fails; off: the run ends, to be resumed"
    )
    max_step_skills: int = SKILLS(5, "K: most step skills per trajectory")
    skill_tokens: int = SKILLS(1024, "most tokens of a skill answer")
    skill_context_limit: int | None = SKILLS(
        12288, "most tokens of a skill prompt and its answer; none: --context-limit"
    )
    skill_temperature: float = SKILLS(1.0, "temperature of skill writing; 0: greedy")
    skill_prefill: str = SKILLS("", "text that every skill answer of a local model starts with, such as '{'")
    openai_base_url: str | None = SKILLS(None, "endpoint for --skill-writer openai; none: the library's default")
    openai_model: str | None = SKILLS(None, "model name for --skill-writer openai (key: OPENAI_API_KEY)")

    routing: str = ROUTING("critical-first", "which skill guides a step", tuple(RULES))

    scorer: str = SCORES(
        "old",
        "who scores the tokens under a skill. old: the policy before the update; reference: the frozen start",
        ("old", "reference"),
    )
    token_budget: int = SCORES(16384, "most padded tokens of a forward pass (micro-batch), in the update too")

    normalize: str = ADVANTAGE(
        "mean_std", "how A_ep is taken against its group: mean and std, or mean only", ("mean_std", "mean")
    )
    group_over: str = ADVANTAGE("steps", "what a group's mean and std are taken over", ("steps", "trajectories"))

    clip: float = UPDATE(0.2, "PPO clip range of the token ratio")
    dual_clip: float | None = UPDATE(
        3.0, "c: the loss of a token with A < 0 is at most c |A| (core_algos.py: clip_ratio_c); none: unbounded"
    )
    kl: float = UPDATE(0.01, "beta: weight of KL(pi || reference), k3 estimator; 0: no reference pass")
    kl_clip: float | None = UPDATE(
        10.0, "the most that a token's k3 counts, in nats (core_algos.py: kl_penalty); none: unbounded"
    )
    epochs: int = UPDATE(1, "passes over an iteration's batch")
    mini_batch: int = UPDATE(256, "step samples per gradient step; 0: all of the iteration")
    warmup: int = UPDATE(0, "iterations of linear warm-up")
    lr_halving: int = UPDATE(0, "the learning rate halves in so many iterations; 0: constant")
    weight_decay: float = UPDATE(0.01, "AdamW's weight decay")
    max_grad_norm: float = UPDATE(1.0, "gradient clipping, L2 norm")

    env_options: dict[str, str] = ENV(  # noqa: RUF009
        {},
        "the environment's own options. alfworld: engine=fast|textworld, data=generate or the official games' folder, "
        "size=small|full of generated rooms. webshop: data=generate or the official files' folder, "
        "goals=human|synthetic. search: questions=generate, a file, folder or hub id, retriever=generate, a corpus "
        "file or http:// of a server. textarena: game=GuessTheNumber-v0 or another of its games",
    )
    train_games: int = ENV(1000, "generated training games")
    prompt: str = ENV("official", "prompt style: the authors', or short ones for small models", ("official", "compact"))
    history: int = ENV(5, "how many past steps a 'window' prompt shows")

    template_options: dict[str, str] = MODEL(  # noqa: RUF009
        {}, "variables of the chat template, such as enable_thinking=true reasoning_effort=low"
    )
    device: str = MODEL(
        "auto", "where the models are; auto: cuda where there is one, else cpu", ("auto", "cpu", "cuda", "mps")
    )
    fit: bool = MODEL(
        False,
        "lower --rollout-budget and --token-budget, then take --gradient-checkpointing and --offload, until the plan "
        "fits the memory there is; on for --model without --recipe",
    )
    dtype: str = MODEL("float32", "dtype of the parameters", ("float32", "bfloat16"))
    mixed_precision: str = MODEL(
        "auto", "autocast of matrix products; auto: bf16 where the device has it in hardware", ("no", "bf16", "auto")
    )
    frozen_dtype: str = MODEL(
        "auto",
        "dtype of frozen models (reference, teacher). auto: bfloat16 for the weights that --mixed-precision bf16 "
        "rounds before each use, so no number changes",
        ("auto", "float32", "bfloat16"),
    )
    offload: bool = MODEL(False, "keep reference and optimizer state in host memory while they are not needed")
    shard: bool = MODEL(False, "split weights, gradients, optimizer and frozen models over all processes")
    gradient_checkpointing: bool = MODEL(False, "recompute activations in the backward pass")
    lora_rank: int = MODEL(0, "rank of LoRA adapters on all linear layers (needs peft); 0: full fine-tuning")

    eval_every: int = RUN(5, "iterations between evaluations; 0: only at the end")
    eval_games: int = RUN(140, "games per split at evaluation, at most")
    eval_temperature: float = RUN(0.4, "sampling temperature of evaluation")
    save_every: int = RUN(10, "iterations between checkpoints")
    keep_checkpoints: int = RUN(2, "newest checkpoints to keep")
    sample_every: int = RUN(1, "iterations between samples.jsonl records")
    tracker: str = RUN("none", "accelerate tracker beside metrics.jsonl", ("none", "tensorboard", "trackio", "wandb"))
    push: str | None = RUN(None, "upload the policy at the end to USER/NAME on the Hub, a private repository")
    strict: bool = RUN(False, "a warning that nothing is learnt ends the run")

    # The frozen models that a variant's loss reads: with --offload they stay on the device for all of the update, since
    # the backward pass may read them again. No setting, hence no type.
    read_in_loss = ()
    kept_models = 0  # whole models that a variant keeps in its state, and so in each checkpoint

    def __post_init__(self):
        """Raises ValueError for a value out of range or an impossible combination, before any model is loaded."""
        if type(self) is not (own := variant_of(self.algo).settings):  # grpo's lambdas are 0, for one
            raise ValueError(f"--algo {self.algo} has settings of its own: {own.__module__}.{own.__name__}")
        self._check_values()
        self.plan = self.plan or self.plan_for is not None
        if self.plan_for is None:  # else the other card decides
            self.mixed_precision = mixed_precision(self.mixed_precision, self.device)
        if self.model.startswith(PREFIX) and (self.prompt, self.context) != ("compact", "chat"):
            raise ValueError(
                f"--model {self.model} knows --prompt compact and --context chat: for others run tools/coldstart.py "
                "with them, and give its folder to --model"
            )
        read_options(self.env, self.env_options)
        if self.model in TINY and (unknown := new_words(self.env, self.env_options)):
            raise ValueError(
                f"--model {self.model} knows only the words of generated {self.env} data: no other {unknown[0]}"
            )
        if self.model in TINY and self.prompt != "compact":
            raise ValueError(
                f"--model {self.model} knows only the words of --prompt compact: leave it out, or take another --model"
            )
        if self.model in TINY and not (VARIANTS.parent / "tiny" / f"{self.env}.py").is_file():
            raise ValueError(f"the tiny model knows no words of --env {self.env}: give --model")
        if self.prompt == "official" and self.max_new_tokens < OFFICIAL_ANSWER:
            raise ValueError(
                f"--prompt official asks for <think>...</think><action>...</action>, which {self.max_new_tokens} "
                f"--max-new-tokens cannot hold: at least {OFFICIAL_ANSWER} (paper: 512), or --prompt compact"
            )
        if self.max_new_tokens >= self.context_limit:
            raise ValueError("--max-new-tokens leaves no room for a prompt in --context-limit")
        if self.dual_clip is not None and self.dual_clip <= 1 + self.clip:
            raise ValueError("--dual-clip must be above 1 + --clip: it bounds what PPO-clip leaves unbounded")
        if self.offload and self.shard:
            raise ValueError("--offload is for one card: with --shard every card holds its part of all of it")
        if self.tasks < self.least_tasks:
            raise ValueError(f"--algo {self.algo} takes skills from other tasks: --tasks must be at least 2")
        if self.rollouts < self.least_rollouts:
            raise ValueError(f"--algo {self.algo} needs another episode of the task: --rollouts must be at least 2")
        self._check_writer()
        self._check_routing()

    def _check_routing(self) -> None:
        """Raises ValueError where no skill could guide a step: that would be GRPO at OPID's cost."""
        usable = {"episode": {"episode"}, "step": {"step"}, "none": set()}.get(self.routing, {"episode", "step"})
        usable = (usable & set(self.levels)) - ({"step"} if self.max_step_skills == 0 else set())
        if self.levels and not usable:
            few = "" if self.max_step_skills else " and --max-step-skills 0"
            raise ValueError(f"--routing {self.routing} guides no step with these weights{few}: use --algo grpo")

    def _check_values(self) -> None:
        hints = typing.get_type_hints(type(self))
        for f in fields(self):
            value, choices = getattr(self, f.name), f.metadata["choices"]
            if choices and value not in choices:
                own = " (an environment of your own: docs/forking.md)" if f.name == "env" else ""
                raise ValueError(f"{flag(f.name)} must be one of {', '.join(choices)}, not {value!r}{own}")
            if not _is_of(value, hints[f.name]):
                raise ValueError(f"{flag(f.name)} must be {f.type}, not {value!r}")
            if isinstance(value, int) and hints[f.name] in (float, float | None):
                setattr(self, f.name, float(value))  # TOML and Python write 1: a tensor of it would round all to ints
            if isinstance(value, float) and not math.isfinite(value):
                raise ValueError(f"{flag(f.name)} must be a number, not {value}")
            least, most = f.metadata["bounds"]
            if (least is not None and value < least) or (most is not None and value > most):
                raise ValueError(f"{flag(f.name)} must be {_between(least, most)}, not {value!r}")
        for name in POSITIVE:
            if getattr(self, name) is not None and getattr(self, name) <= 0:
                raise ValueError(f"{flag(name)} must be positive, not {getattr(self, name)}")
        for name in NOT_NEGATIVE:
            if (getattr(self, name) or 0) < 0:
                raise ValueError(f"{flag(name)} must not be negative")

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
        if self.skills_may_fail and self.skill_writer in LOCAL_WRITERS:
            raise ValueError("--skills-may-fail is for --skill-writer openai or a function of your own")
        room = "context_limit" if self.skill_context_limit is None else "skill_context_limit"
        if self.skill_writer in LOCAL_WRITERS and self.skill_tokens >= getattr(self, room):
            raise ValueError(f"--skill-tokens leaves no room for a transcript in {flag(room)}")

    def check_trainable(self) -> None:
        """Raises ValueError for settings that would train on wrong numbers, or not do what they say."""
        if self.dtype == "bfloat16" and not self.lora_rank:
            raise ValueError(
                "--dtype bfloat16 rounds most updates of a small learning rate away: full fine-tuning needs --dtype "
                "float32 (with --mixed-precision bf16 the products are in bfloat16 all the same), or --lora-rank"
            )
        needed = {"none": (), "tensorboard": ("tensorboard", "tensorboardX")}.get(self.tracker, (self.tracker,))
        if needed and not any(find_spec(name) for name in needed):
            raise ValueError(f"--tracker {self.tracker} needs its package: pip install {needed[0]}")

    @property
    def levels(self) -> tuple[Level, ...]:
        """The levels of skills that guide steps: those whose lambda is not 0. None: this is GRPO."""
        given = {"episode": self.episode_weight, "step": self.step_weight}
        return tuple(level for level in LEVELS if given[level] != 0)

    @property
    def writes_skills(self) -> bool:
        """Whether --skill-writer is asked for skills."""
        return bool(self.levels)

    @property
    def least_tasks(self) -> int:
        """The fewest tasks that each process must play in an iteration."""
        return 1

    @property
    def least_rollouts(self) -> int:
        """The fewest episodes of a task."""
        return 1

    def check_model(self, model) -> None:
        """Raises ValueError where this variant cannot train this model."""

    def further_models(self, tokenizer, device) -> dict:
        """Frozen models that a variant reads beside policy and reference, by name."""
        return {}

    @property
    def longest(self) -> int:
        """Tokens of the longest context that the policy, or a copy of it, may read."""
        writes = self.writes_skills and self.skill_writer in LOCAL_WRITERS
        return max(self.context_limit, (writes and self.skill_context_limit) or 0)

    def reads(self, name: str) -> bool:
        """Whether a run needs the frozen "reference" beside the policy."""
        scores = bool(self.levels) and self.scorer == name
        return (self.kl > 0 and name == "reference") or scores or (self.writes_skills and self.skill_writer == name)

    def to_dict(self) -> dict:
        return asdict(self)

    @classmethod
    def from_recipe(cls, name: str, **changes) -> Config:
        """The settings of a recipe, some of them changed; those of the variant that `algo` names, where it does."""
        settings = _over(read_recipe(name, every_setting(changes.get("algo"))), changes)
        return variant_of(settings.get("algo", cls.algo)).settings(**settings)


def changed(before: dict, now: dict) -> list[str]:
    """The names of the settings that differ between a run's settings `before` and `now`. A flag that is newer than the
    run counts as its default."""
    had = {f.name: f.default for f in fields(variant_of(now["algo"]).settings)} | before
    return [name for name in now if had.get(name) != now[name]]


def flag(name: str) -> str:
    return "--" + name.replace("_", "-")


NULLABLE = {name for name, hint in typing.get_type_hints(Config).items() if type(None) in typing.get_args(hint)}


def _between(least: float | None, most: float | None) -> str:
    return f"at least {least}" if most is None else f"between {least} and {most}"


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


def read_recipe(name: str, known: set[str], above: tuple[str, ...] = ()) -> dict:
    """A recipe's settings, on top of those of the recipe that it names as its `base`: a name in recipes/ or a path to a
    .toml file. Raises ValueError for one that is not there, holds an unknown setting or is its own base."""
    path = Path(name) if name.endswith(".toml") else RECIPES / f"{name}.toml"
    if not path.is_file():
        names = ", ".join(sorted(p.stem for p in RECIPES.glob("*.toml")))
        raise ValueError(f"no recipe {name!r}; known: {names}, or a path to a .toml file")
    if name in above:
        raise ValueError(f"recipes are one another's base: {' -> '.join((*above, name))}")
    settings = tomllib.loads(path.read_text())
    if "algo" in settings:
        known = known | every_setting(settings["algo"])
    base = read_recipe(settings.pop("base"), known, (*above, name)) if "base" in settings else {}
    # TOML has no null: "none" is what a flag calls it
    settings = {name: None if value == "none" and name in NULLABLE else value for name, value in settings.items()}
    unknown = settings.keys() - known
    if unknown:
        raise ValueError(f"{path}: unknown settings {', '.join(sorted(unknown))}")
    return _over(base, settings)


def _over(below: dict, above: dict) -> dict:
    """`below` overridden by `above`. An environment's options are merged one by one, unless the environment changes."""
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


# ---- where settings come from ----------------------------------------------------------------------------------------


def variant_of(algo: str):
    """The Variant that `--algo` names: a file of variants/, or package.module:NAME. Raises ValueError where there is
    none."""
    if ":" in algo:
        return _imported_variant(algo)
    name = re.sub(r"\W", "_", algo)  # grpo+opsd is variants/grpo_opsd.py
    if not re.fullmatch(r"[a-z]\w*", name) or not (VARIANTS / f"{name}.py").is_file():
        names = sorted(path.stem.replace("_", "-") for path in VARIANTS.glob("[a-z]*.py"))
        raise ValueError(f"--algo must be one of {', '.join(names)}, or package.module:NAME, not {algo!r}")
    return import_module(f"variants.{name}").VARIANT


def _imported_variant(algo: str):
    module, _, name = algo.partition(":")
    try:
        variant = getattr(import_module(module), name)
    except (ImportError, AttributeError, TypeError, ValueError) as error:  # TypeError: of a name that begins with a dot
        raise ValueError(f"--algo {algo}: {error}") from error
    if not isinstance(variant, import_module("train").Variant):
        raise ValueError(f"--algo {algo} is no Variant of train.py")
    return variant


def settings_to_save(config: Config, date: str) -> dict:
    """What a policy says of itself when it is saved. `date`: the day that some chat templates
    print into every prompt."""
    values = config.to_dict()
    if config.lora_rank:
        values["dtype"] = "float32"  # of the merged weights (lm/loading.py): in less it would be another policy
    return {
        "base": about_policy(config.model).get("base", config.model),
        "algo": config.algo,
        "date": date,
        "acts": {name: values[name] for name in ACTS},
        "evaluated": {name: values[name] for name in EVALUATED},
    }


def default_recipe(model: str, env: str) -> str:
    """The recipe for flags that are not given: the laptop's for its own models, else the paper's run of `env`."""
    base = about_policy(model).get("base", model)
    if base in TINY or base.startswith(PREFIX):
        usual = "laptop" if base in TINY else "laptop-smollm2"
        own = f"{usual}-{env}"
    else:
        usual, own = "alfworld-qwen2.5-3b", f"{env}-qwen2.5-3b"
    return own if (RECIPES / f"{own}.toml").is_file() else usual  # an environment of one's own takes ALFWorld's


@dataclass
class CommandLine:
    """The flags that are read first: they decide which other flags there are, and their defaults."""

    recipe: str | None
    model: str | None
    env: str | None
    algo: str | None

    @classmethod
    def read(cls, argv: list[str] | None) -> CommandLine:
        parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
        for f in fields(cls):
            parser.add_argument(flag(f.name), nargs="?")
        return cls(**vars(parser.parse_known_args(argv)[0]))

    def starts_from(self, known: set[str], parts: tuple[str, ...] = ("acts",)) -> tuple[str | None, dict]:
        """-> the default recipe's name (None where --recipe takes its place), and all settings below the flags. From
        low to high: the default recipe, but for its data; `parts` of what a saved policy says of itself; --recipe."""
        recipe = read_recipe(self.recipe, known) if self.recipe else {}
        model = self.model or recipe.get("model", "tiny")
        said = about_policy(model)
        saved = {name: value for part in parts for name, value in said.get(part, {}).items()}
        if unknown := saved.keys() - known:
            names = ", ".join(sorted(unknown))
            raise ValueError(f"{SAVED} of {model} is of another version: it has the unknown settings {names}")
        if self.recipe and not saved:
            return None, recipe
        name = default_recipe(model, self.env or recipe.get("env") or saved.get("env", "alfworld"))
        settings = read_recipe(name, known)
        if not name.startswith("laptop"):  # a paper's run: on generated data, and as this machine has it
            settings = {key: value for key, value in settings.items() if key not in OF_ITS_CARD} | {"fit": True}
        settings = _over(settings | {"model": model}, saved)
        return name, _over(settings, recipe)


def settings_come_from(argv: list[str] | None = None) -> str:
    """One line for the user: where the settings below the flags come from."""
    line = CommandLine.read(argv)
    name, _ = line.starts_from(every_setting(line.algo))
    if not (line.model or line.recipe):
        return (
            f"no --model: the laptop recipe, recipes/{name}.toml (--model NAME trains your own by the paper's settings)"
        )
    below = []
    if name:
        file = f"recipes/{name}.toml"
        below.append(file if name.startswith("laptop") else f"the paper's ({file}) on generated data")
    if line.model and about_policy(line.model):
        below.append(f"what {line.model} says of itself")
    if line.recipe:
        below.append(f"recipe {line.recipe}")
    return f"settings: {', '.join(below)}, and flags"


def every_setting(algo: str | None = None) -> set[str]:
    """The names of Config's settings, and of all variants': those of variants/ and `algo`, which may be elsewhere."""
    names = {path.stem for path in VARIANTS.glob("[a-z]*.py")} | ({algo} if algo else set())
    return {f.name for name in names for f in fields(variant_of(name).settings)}


def parse_args(
    argv: list[str] | None = None,
    *,
    program: str = "train.py",
    about: str = "OPID, On-Policy Skill Distillation for agentic RL, in plain PyTorch.",
    shown: tuple[str, ...] | None = None,  # settings that `--help` explains; None: all
    saved: tuple[str, ...] = ("acts",),  # parts of what a saved policy says of itself that count
    for_several: bool = False,  # one command line for several methods: flags that do nothing with this one pass
) -> Config:
    """The command line -> Config. A flag overrides the recipe, which overrides what a saved policy says of itself,
    which overrides the default recipe. Exits with a clear message on an unknown flag, a bad value or an impossible
    combination."""
    line, usage = CommandLine.read(argv), f"{program} [--recipe NAME] [flags]"
    parser = argparse.ArgumentParser(prog=program, description=about, allow_abbrev=False, usage=usage)
    try:
        _, settings = line.starts_from(every_setting(line.algo), saved)
        algo = line.algo or settings.get("algo", Config.algo)
        kind = variant_of(algo).settings
        add_flags(parser, kind, shown, settings)
        namespace, unknown = parser.parse_known_args(argv)
        if unknown:
            raise ValueError(f"unrecognized arguments: {' '.join(unknown)}{nearest(unknown[0], kind)}")
        given = vars(namespace)
        given.pop("recipe", None)
        given |= {name: dict(given[name]) for name in ("env_options", "template_options") if name in given}
        settings = _over(settings, given)
        if others := settings.keys() - {f.name for f in fields(kind)}:
            raise ValueError(f"--algo {algo} has no {', '.join(map(flag, sorted(others)))}")
        config = kind(**settings)
        # of a method that sets some values itself: GRPO's lambdas are 0
        plain = given.keys() - {"mixed_precision", "env_options", "template_options"}
        idle = [name for name in plain if getattr(config, name) != given[name]]
        if idle and not for_several:
            raise ValueError(f"--algo {algo} does nothing with {', '.join(map(flag, idle))}")
        return config
    except ValueError as error:
        parser.error(str(error))


def nearest(unknown: str, kind: type[Config]) -> str:
    """A hint at what was meant; "" where nothing is near."""
    name = unknown.partition("=")[0].replace("_", "-")
    if name in map(flag, every_setting() - {f.name for f in fields(kind)}):
        return " (a flag of another --algo)"
    meant = {"--lambda": ["--episode-weight", "--step-weight"], "--lr": ["--learning-rate"]}.get(name)
    found = meant or get_close_matches(name, [flag(f.name) for f in fields(kind)], 2)
    return f" (did you mean {' or '.join(found)}?)" if found else ""


def add_flags(
    parser: argparse.ArgumentParser, kind: type[Config], shown: tuple[str, ...] | None, settings: dict
) -> None:
    """A flag for each setting, in the groups of `--help`. `settings`: what holds where the flag is not given."""
    groups, hints = {}, typing.get_type_hints(kind)
    for f in fields(kind):
        title, hidden = f.metadata["group"], shown is not None and f.name not in shown
        if not groups:
            groups[title] = parser.add_argument_group(title)
            groups[title].add_argument("--recipe", help="settings to start from: a name in recipes/ or a .toml file")
        if title not in groups:
            groups[title] = parser.add_argument_group(title)
        annotation = hints[f.name]
        if annotation == dict[str, str]:
            explained = argparse.SUPPRESS if hidden else f.metadata["help"]
            groups[title].add_argument(
                flag(f.name), nargs="*", type=_key_value, metavar="KEY=VALUE", default=argparse.SUPPRESS, help=explained
            )
            continue
        own = next(k for k in (*typing.get_args(annotation), annotation) if k in (str, int, float, bool))
        here = settings.get(f.name, f.default)
        paper = "" if here == f.default or f.metadata["group"] == "this --algo (variants/)" else f"; paper: {f.default}"
        explained = (
            argparse.SUPPRESS if hidden else f"{f.metadata['help']} (default: {here if here != '' else 'none'}{paper})"
        )
        if own is bool:
            groups[title].add_argument(
                flag(f.name), action=argparse.BooleanOptionalAction, default=argparse.SUPPRESS, help=explained
            )
            continue
        groups[title].add_argument(
            flag(f.name),
            type=_optional(own) if annotation is not own else own,
            choices=f.metadata["choices"] if f.name != "env" else None,  # Config says more
            metavar=f"{{{','.join(f.metadata['choices'])}}}" if f.metadata["choices"] else own.__name__.upper(),
            default=argparse.SUPPRESS,
            help=explained,
        )
