"""One flat, typed config. The command line, the recipes and `--help` are all made from it."""

from __future__ import annotations

import argparse
import tomllib
import types
import typing
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

from baselines.methods import METHODS, Method
from envs import ENVIRONMENTS
from router import MODES

POSITIVE = (
    *("iterations", "tasks", "rollouts", "max_steps", "max_new_tokens", "context_limit", "skill_tokens", "epochs"),
    *("token_budget", "generate_budget", "train_games", "eval_games", "save_every", "keep_checkpoints", "sample_every"),
    *("temperature", "learning_rate", "max_grad_norm", "eval_batch"),
)
NOT_NEGATIVE = ("warmup", "kl", "clip", "mini_batch", "lora_rank", "max_step_skills", "eval_every", "history")
NOT_NEGATIVE += ("lr_halving", "eval_temperature", "skill_temperature", "invalid_penalty", "weight_decay")
NOT_NEGATIVE += ("state_weight", "gate_beta", "rlsd_clip", "rlsd_iterations", "distill_weight")
NOT_NEGATIVE += ("skill_iterations",)

DISTILL_WEIGHTS = {"gated": 0.01, "ungated": 0.01, "k3": 0.001}  # of the SDAR release's ALFWorld scripts

RECIPES = Path(__file__).parent / "recipes"


def _(default, help: str, choices=None):
    return field(default=default, metadata={"help": help, "choices": choices})


@dataclass
class Config:
    """Defaults are the laptop run; recipes/*.toml hold the paper's settings. Units stand in each field's help."""

    # method
    algo: str = _("opid", "training method (methods.py)", tuple(METHODS))
    routing: str = _("critical-first", "which skill guides a step", MODES)
    episode_weight: float = _(0.1, "lambda_ep: weight of A_skill on episode-guided tokens (paper: 0.001)")
    step_weight: float = _(0.1, "lambda_step: weight of A_skill on step-guided tokens (paper: 0.001)")
    skill_iterations: int = _(0, "iterations in which both lambdas fall to 0, in a line; 0: they stay (paper)")
    skill_clip: float | None = _(None, "bound of |A_skill| a token, in nats; none: unbounded (paper)")
    state_weight: float = _(1.0, "gigpo: weight of the step-relative advantage")
    gamma: float = _(0.95, "gigpo: discount a step of the return that state groups compare")
    distill_weight: float | None = _(None, "c: weight of the distillation loss; none: 0.01, of skill-sd 0.001")
    gate_beta: float = _(5.0, "sdar, opsd: steepness of the gate sigmoid(beta Delta), per nat")
    rlsd_mix: float = _(0.5, "rlsd: mu, how far Delta rescales A_ep at first, 0 to 1")
    rlsd_iterations: int = _(50, "rlsd: iterations in which mu falls to 0 (the release's scripts: 100); 0: it stays")
    rlsd_clip: float = _(0.2, "rlsd: bound of the rescaling, 1 - eps to 1 + eps")
    teacher: str | None = _(None, "opd: the larger model, named as --model is; it must have the same tokenizer")
    scorer: str = _(
        "reference", "weights that score the skill-augmented context (paper: old)", ("old", "reference", "ema")
    )
    shift_base: str = _(
        "old",
        "what the skill-augmented log-prob is compared with: the sampling policy's (paper), or the scorer's own, both "
        "of the plain context; the same with --scorer old",
        ("old", "scorer"),
    )
    ema_decay: float = _(0.99, "decay of the EMA weights, an iteration, for --scorer ema, --skill-writer ema")
    skill_writer: str = _(
        "reference", "weights that write the skills (paper: policy)", ("policy", "reference", "ema", "openai")
    )
    max_step_skills: int = _(5, "K: most step skills a trajectory")
    normalize: str = _("mean_std", "outcome advantage: group mean and std, or mean only", ("mean_std", "mean"))
    group_over: str = _("steps", "what group statistics are taken over", ("steps", "trajectories"))

    # skill writing
    skill_tokens: int = _(96, "most tokens of a skill answer")
    skill_context_limit: int | None = _(None, "most tokens of transcript and answer; none: --context-limit")
    skill_transcript: str = _(
        "prompt",
        "what the writer reads: a transcript in the prompt, or the finished conversation (chat; cached if it played)",
        ("prompt", "conversation"),
    )
    skill_temperature: float = _(1.0, "temperature of skill writing; 0: greedy")
    skill_prefill: str = _("", "text that starts every skill answer for the model, such as '{'")
    openai_base_url: str | None = _(None, "endpoint for --skill-writer openai; none: the library's default")
    openai_model: str | None = _(None, "model name for --skill-writer openai (key: OPENAI_API_KEY)")

    # environment
    env: str = _("alfworld", "environment", ENVIRONMENTS)
    engine: str = _("fast", "ALFWorld engine", ("fast", "textworld"))
    games: str = _(
        "generate", "official games or data: a folder (Search QA: also a file or hub id of questions), or 'generate'"
    )
    retriever: str = _("generate", "Search QA passages: a JSON-lines corpus, http:// of a server, 'generate'")
    game_size: str = _("small", "size of generated ALFWorld rooms", ("small", "full"))
    webshop_goals: str = _("human", "WebShop: what people asked for, or synthetic instructions", ("human", "synthetic"))
    train_games: int = _(1000, "generated training games")
    eval_games: int = _(200, "games a split at evaluation, at most")
    max_steps: int = _(20, "most steps an episode")
    history: int = _(5, "last steps shown in a 'window' prompt")
    success_reward: float = _(10.0, "outcome reward of a solved task")
    # 0, not the paper's 0.1: in a group whose outcomes are all equal the penalty alone is what gets normalised, to the
    # same size as a real outcome, and for small models with many invalid actions that noise makes training collapse.
    invalid_penalty: float = _(0.0, "taken off a step's return for an invalid action (paper: 0.1)")

    # model
    model: str = _("tiny", "'tiny', 'smollm2', a folder or a hub id")
    prompt: str = _("auto", "prompt style; auto: compact for the tiny model", ("auto", "official", "compact"))
    context: str = _("chat", "each step a growing conversation, or a prompt of its own", ("chat", "window"))
    context_limit: int = _(1024, "most tokens of prompt and response together")
    max_new_tokens: int = _(12, "most tokens of a response")
    dtype: str = _("float32", "dtype of the weights", ("float32", "bfloat16"))
    mixed_precision: str = _("no", "accelerate's autocast", ("no", "bf16"))
    gradient_checkpointing: bool = _(False, "recompute activations in the backward pass")
    lora_rank: int = _(0, "rank of LoRA adapters on all linear layers (needs peft); 0: full fine-tuning")

    # scale
    iterations: int = _(60, "training iterations")
    tasks: int = _(16, "tasks an iteration")
    rollouts: int = _(8, "rollouts a task (N)")
    temperature: float = _(1.0, "sampling temperature of training rollouts")

    # update
    learning_rate: float = _(3e-4, "AdamW's peak learning rate")
    warmup: int = _(0, "iterations of linear warm-up")
    lr_halving: int = _(20, "iterations in which the learning rate halves; 0: constant (paper)")
    weight_decay: float = _(0.01, "AdamW's weight decay")
    epochs: int = _(1, "passes over an iteration's batch")
    mini_batch: int = _(512, "step samples a gradient step; 0: all of the iteration")
    clip: float = _(0.2, "PPO clip range of the token ratio")
    kl: float = _(0.01, "beta: weight of KL(pi || reference), k3 estimator; 0: no reference pass")
    max_grad_norm: float = _(1.0, "gradient clipping, L2 norm")
    token_budget: int = _(4096, "most padded tokens a forward pass (micro-batch)")
    generate_budget: int = _(8192, "most rows x length of one skill-writing generate call, tokens; a GPU wants more")

    # run
    seed: int = _(0, "seed of everything random")
    out: str = _("runs/opid", "run folder")
    plan: bool = _(False, "print the estimated peak memory of this run, without loading weights, and exit")
    resume: bool = _(False, "go on from the newest checkpoint in --out")
    eval_every: int = _(10, "iterations between evaluations; 0: only at the end")
    eval_temperature: float = _(0.4, "sampling temperature of evaluation")
    eval_batch: int | None = _(None, "held-out games played at a time; none: as many as an iteration has episodes")
    save_every: int = _(10, "iterations between checkpoints")
    keep_checkpoints: int = _(2, "newest checkpoints to keep")
    sample_every: int = _(5, "iterations between samples.jsonl records")
    tracker: str = _("none", "accelerate tracker beside metrics.jsonl", ("none", "tensorboard", "wandb"))

    def __post_init__(self):
        """Raises ValueError for a value out of range or an impossible combination, before any model is loaded."""
        for f in fields(self):
            value, choices = getattr(self, f.name), f.metadata["choices"]
            if choices and value not in choices:
                raise ValueError(f"{flag(f.name)} must be one of {', '.join(choices)}, not {value!r}")
            if not _is_of(value, typing.get_type_hints(Config)[f.name]):
                raise ValueError(f"{flag(f.name)} must be {f.type}, not {value!r}")
        for name in POSITIVE:
            if getattr(self, name) is not None and getattr(self, name) <= 0:
                raise ValueError(f"{flag(name)} must be positive, not {getattr(self, name)}")
        for name in NOT_NEGATIVE:
            if (getattr(self, name) or 0) < 0:
                raise ValueError(f"{flag(name)} must not be negative")
        if self.prompt == "auto":
            self.prompt = "compact" if self.model == "tiny" else "official"
        outside = self.games != "generate" or (self.env == "search" and self.retriever != "generate")
        if self.model == "tiny" and self.env != "alfworld" and outside:
            raise ValueError(f"--model tiny knows only the words of generated {self.env} data: no --games, --retriever")
        if self.max_new_tokens >= self.context_limit:
            raise ValueError("--max-new-tokens leaves no room for a prompt in --context-limit")
        self._check_method()

    def _check_method(self) -> None:
        method = self.method
        if self.skill_writer == "openai" and self.uses_skills and method.skills != "script" and not self.openai_model:
            raise ValueError("--skill-writer openai needs --openai-model")
        if self.skill_transcript == "conversation" and (self.context != "chat" or self.skill_writer == "openai"):
            raise ValueError("--skill-transcript conversation needs --context chat and a local --skill-writer")
        if self.routing == "none" and self.levels:
            raise ValueError("--routing none guides no step: use --algo grpo")
        if self.routing == "additive" and method.one_score:
            raise ValueError(f"--algo {self.algo} has one teacher a token: --routing additive would give it two")
        if method.teacher != (self.teacher is not None):
            raise ValueError(
                "--algo opd needs --teacher, the larger model" if method.teacher else "--teacher is for opd"
            )
        if method.skills == "script" and self.env != "alfworld":
            raise ValueError(
                f"--algo {self.algo} needs a script that writes skills: there is none for --env {self.env}"
            )
        if method.skills == "shuffled" and self.tasks < 2:
            raise ValueError(f"--algo {self.algo} takes skills from other tasks: --tasks must be at least 2")
        for name in ("gamma", "rlsd_mix", "ema_decay"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{flag(name)} must be between 0 and 1, not {getattr(self, name)}")
        if self.distill_weight is None and method.distill:
            self.distill_weight = DISTILL_WEIGHTS[method.distill]

    @property
    def method(self) -> Method:
        return METHODS[self.algo]

    @property
    def levels(self) -> tuple[str, ...]:
        """The levels of guidance that are re-scored: with an added shift, those of a weight that is not 0."""
        method, weights = self.method, {"episode": self.episode_weight, "step": self.step_weight}
        if method.skills is None or method.acting:
            return ()
        return tuple(level for level, weight in weights.items() if weight != 0 or method.shift != "add")

    @property
    def base(self) -> str:
        """Whose log-probs of the plain contexts A_skill is the difference to."""
        return self.scorer if self.shift_base == "scorer" and self.levels else "old"

    @property
    def plain_scores(self) -> list[str]:
        """Whose log-probs of the plain contexts an update needs."""
        needed = ["old", self.base, *["reference"] * (self.kl > 0), *["teacher"] * self.method.teacher]
        return list(dict.fromkeys(needed))

    @property
    def uses_skills(self) -> bool:
        """Zero weights take the same path as GRPO: no skill is written, nothing is re-scored."""
        return bool(self.levels) or self.method.acting

    @property
    def keeps_conversations(self) -> bool:
        """Whether the policy writes about the conversations that it has just had, going on from their cache."""
        asks = self.uses_skills and self.method.skills != "script"
        return asks and self.skill_transcript == "conversation" and self.skill_writer == "policy"

    def mix(self, iteration: int) -> float:
        """RLSD's mu: from `rlsd_mix` at iteration 0 in a line to 0 at `rlsd_iterations`."""
        return self.rlsd_mix * _left(iteration, self.rlsd_iterations)

    def fade(self, iteration: int) -> float:
        """What both lambdas are multiplied by: from 1 at iteration 0 in a line to 0 at `skill_iterations`."""
        return _left(iteration, self.skill_iterations)

    @property
    def keeps_ema(self) -> bool:
        """Whether a run needs weights that follow the policy's slowly."""
        writes = self.uses_skills and self.method.skills != "script" and self.skill_writer == "ema"
        return writes or (bool(self.levels) and self.scorer == "ema")

    def to_dict(self) -> dict:
        return asdict(self)


def _left(iteration: int, iterations: int) -> float:
    """From 1 at iteration 0 in a line to 0 at `iterations`, where that is not 0."""
    return max(0.0, 1 - iteration / iterations) if iterations else 1.0


def changed(before: dict, now: dict) -> list[str]:
    """The settings of `now` that a run with the settings `before` did not have. Of a flag that came later it had the
    default."""
    had = Config().to_dict() | before
    return [name for name in now if had[name] != now[name]]


def flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _is_of(value, annotation) -> bool:
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


def read_recipe(name: str) -> dict:
    """A recipe's settings: a name in recipes/ or a path to a .toml file. Raises ValueError for one that is not there
    or holds an unknown setting."""
    path = Path(name) if name.endswith(".toml") else RECIPES / f"{name}.toml"
    if not path.is_file():
        known = ", ".join(sorted(p.stem for p in RECIPES.glob("*.toml")))
        raise ValueError(f"no recipe {name!r}; known: {known}, or a path to a .toml file")
    settings = tomllib.loads(path.read_text())
    unknown = settings.keys() - {f.name for f in fields(Config)}
    if unknown:
        raise ValueError(f"{path}: unknown settings {', '.join(sorted(unknown))}")
    return {name: float(v) if typing.get_type_hints(Config)[name] is float else v for name, v in settings.items()}


def parse_args(argv: list[str] | None = None, base: dict | None = None) -> Config:
    """The command line -> Config. A flag overrides the recipe, which overrides `base`, which overrides the default.
    Exits with a clear message on an unknown flag, a bad value or an impossible combination."""
    parser = argparse.ArgumentParser(
        prog="train.py",
        description="OPID, On-Policy Skill Distillation for agentic RL, in plain PyTorch.",
        allow_abbrev=False,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--recipe", help="settings to start from: a name in recipes/ or a .toml file")
    for f in fields(Config):
        annotation = typing.get_type_hints(Config)[f.name]
        kind = next(k for k in (*typing.get_args(annotation), annotation) if k in (str, int, float, bool))
        options: dict = {"default": argparse.SUPPRESS, "help": f"{f.metadata['help']} (default: {f.default})"}
        if kind is bool:
            options["action"] = argparse.BooleanOptionalAction
        else:
            options["type"] = _optional(kind) if annotation is not kind else kind
            options["choices"] = f.metadata["choices"]
            options["metavar"] = None if f.metadata["choices"] else kind.__name__.upper()
        parser.add_argument(flag(f.name), **options)
    given = vars(parser.parse_args(argv))
    try:
        recipe = given.pop("recipe", None)
        return Config(**{**(base or {}), **(read_recipe(recipe) if recipe else {}), **given})
    except ValueError as error:
        parser.error(str(error))
