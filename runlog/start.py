"""Everything a run needs before its first iteration: models, games, optimizer, writer, log. And what happens around an
iteration: seeding, timing, checks, evaluation, saving."""

from __future__ import annotations

import copy
import random
import sys
import time
from collections.abc import Callable, Generator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Generic

import torch
from typing_extensions import TypeVar

from config import Config
from data import Batch, Level, Trajectory
from envs import GameFailure, TextEnv, fingerprints
from envs.guard import check_first_game, most_failed
from evaluate import environment, evaluate_everywhere, games_of, held_out_games
from lm.adapters import base_of, left_out
from lm.encoder import Encoder
from lm.loading import add_lora, frozen_copy
from lm.obstacles import (
    Mendable,
    check_gap,
    check_model,
    check_positions,
    logprob_gap,
    sampling_note,
    untrained_positions,
)
from lm.processes import Offload, Processes, gathered, give_back, shard
from lm.sampler import Sampler, end_of_turn_ids
from lm.scoring import counted, layout_noise
from lm.writers import Writer, import_writer, model_writer, openai_writer, that_may_fail
from memory import hours
from memory.machine import peak_mib
from memory.plan import Plan, fitted, planned
from runlog import RunLog, accelerator_of, checkpoints, sample, silence
from runlog.live import table_of
from runlog.metrics import TOKENS, Metrics, advantage_metrics, entropy, silent_groups, sizes_of
from runlog.silence import fall, followed, shares, signs, silences
from skills import analysis_prompt
from tiny.loading import load_model

NOISE_TRAJECTORIES = 2  # that the noise floor is measured on: every step of them is scored alone, once a run


SettingsT = TypeVar("SettingsT", bound=Config, default=Config, covariant=True)


@dataclass
class Run(Generic[SettingsT]):
    """What lasts from one iteration to the next. `Run[Settings]` is that of a variant with flags of its own."""

    config: SettingsT
    processes: Processes
    log: RunLog
    policy: Any
    tokenizer: Any
    encoder: Encoder
    models: dict[str, Any]  # by the names that --scorer and --skill-writer use: old, policy, reference
    optimizer: torch.optim.Optimizer
    offload: Offload
    make_env: Callable[[], TextEnv]
    games: list  # of the training split
    levels: tuple[Level, ...]  # of the skills that guide steps: those whose lambda is not 0. None: this is GRPO
    writer: Writer = field(init=False, repr=False)  # where the method writes skills
    state: dict[str, Any] = field(default_factory=dict)  # a variant's own, kept in checkpoints: plain values only
    iteration: int = -1  # the one under way
    rng: random.Random = field(default_factory=random.Random)  # of it, the same in all processes
    metrics: Metrics = field(default_factory=dict)  # of it
    lap: float = field(default_factory=time.perf_counter)  # when its last step ended
    evaluation: float | None = None  # seconds of the last one; None: there was none yet
    finished: int = -1  # the last iteration that came to its end
    kept: dict[str, Any] = field(default_factory=dict)  # `state` at its end
    ahead: bool = False  # whether the weights have moved since
    interrupted: bool = False  # whether the run is to end with this iteration (ending.py)
    tried: int = 0  # episodes since this process started
    failed: int = 0  # of them

    @property
    def trained(self) -> list[torch.nn.Parameter]:
        return self.optimizer.param_groups[0]["params"]

    @property
    def read_in_loss(self) -> list[torch.nn.Module]:
        """Those with weights of their own."""
        models = [self.models[name] for name in self.config.read_in_loss]
        return [model for model in models if isinstance(model, torch.nn.Module)]

    def begin(self, iteration: int) -> None:
        """Seeds everything random for this iteration, PyTorch by process, `rng` alike in all; and its learning rate."""
        self.iteration, self.metrics, self.lap = iteration, dict.fromkeys(TOKENS, 0.0), time.perf_counter()
        if iteration == self.log.first_iteration:
            self.log.table = table_of(self)
        counted.clear()
        torch.manual_seed(self.config.seed * 1_000_003 + iteration * 1009 + self.processes.rank)
        self.rng = random.Random(f"{self.config.seed} {iteration}")
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.config, iteration)

    def sampler(self) -> Sampler:
        """For this iteration's rollouts. It draws a seed from PyTorch's random numbers."""
        config = self.config
        return Sampler(
            self.policy,
            self.tokenizer,
            max_new_tokens=config.max_new_tokens,
            temperature=config.temperature,
            reuse_cache=config.reuse_cache,
            record=True,
            rollout_budget=config.rollout_budget,
            token_budget=config.token_budget,
        )

    def autocast(self):
        return self.processes.accelerator.autocast()

    @contextmanager
    def reading(self, *models) -> Generator[None]:
        """Around passes without gradient: models on the device, whole, in evaluation mode and the run's precision. None
        is no model."""
        models = [model for model in models if model is not None]
        frozen = [model for model in models if isinstance(model, torch.nn.Module) and model is not self.policy]
        with ExitStack() as stack:
            stack.enter_context(self.autocast())
            stack.enter_context(self.offload.needed(*frozen))
            for model in models:
                stack.enter_context(gathered(model))
                stack.callback(model.train, model.training)
                model.eval()
            yield

    def note(self, step: str, metrics: Metrics) -> None:
        """The metrics of a step of the iteration, which ends here, its seconds, and the tokens that it read or sampled.
        Those of an evaluation do not count."""
        give_back()
        now = time.perf_counter()
        self.metrics |= metrics | {f"seconds/{step}": now - self.lap}
        if step != "evaluate":
            for kind, count in counted.items():
                name = f"tokens/{'skills' if (step, kind) == ('skills', 'sampled') else kind}"
                self.metrics[name] = self.metrics.get(name, 0) + count
        counted.clear()
        self.lap = time.perf_counter()

    def check_scores(self, batch: Batch) -> Metrics:
        """Once a run: sampled and scored log-probs agree, and what A_skill would be without any skill."""
        config, steps, before = self.config, batch.steps, counted.copy()
        largest, mean = logprob_gap([step.logprobs or [] for step in steps], batch.old_logprobs)
        check_gap(largest, mean, torch.bfloat16 if config.mixed_precision == "bf16" else self.policy.dtype)
        metrics = {"rollout/logprob_gap": largest}
        if self.levels:
            few = sum(len(trajectory.steps) for trajectory in batch.trajectories[:NOISE_TRAJECTORIES])
            with self.reading(self.policy):
                noise = layout_noise(
                    self.policy,
                    [step.context for step in steps[:few]],
                    [step.response for step in steps[:few]],
                    temperature=config.temperature,
                    token_budget=config.token_budget,
                )
            metrics["advantage/noise_floor"] = noise
            counted.update(scored=before["scored"] - counted["scored"])  # no part of an iteration's work
        return metrics

    def evaluate(self) -> None:
        """Held-out success, and its table printed. Before the first iteration: the policy before training."""
        with gathered(self.policy):
            success, counts, table = evaluate_everywhere(self.policy, self.encoder, self.config, self.processes)
        self.log.evaluation(self.iteration, success, counts, table)
        self.note("evaluate", {f"eval/{split}/success": share for split, share in success.items()})
        self.evaluation = self.metrics["seconds/evaluate"]

    def finish(self, batch: Batch) -> None:
        """Evaluate, log, save, each when it is due."""
        config, iteration, last = self.config, self.iteration, self.iteration == self.config.iterations - 1
        if last or (config.eval_every and (iteration + 1) % config.eval_every == 0):
            self.evaluate()
        if iteration == 0:
            self.metrics["memory/peak_mib"] = self.processes.largest(peak_mib(self.processes.device))
        if iteration % config.sample_every == 0:
            self.log.samples(iteration, self.tokenizer, batch)
        groups = [trajectory.group for trajectory in batch.trajectories]
        silent = silent_groups(groups, [trajectory.success for trajectory in batch.trajectories]).values()
        advantages = batch.advantages
        metrics = self.metrics | {"advantage/silent_groups": sum(silent) / max(1, len(silent))}
        metrics |= advantage_metrics(advantages.outcome, advantages.skill, batch.mask)
        metrics |= {"rollout/entropy": entropy(batch.old_logprobs, batch.mask)}
        metrics |= shares(batch, self.encoder.ends, self.tokenizer.unk_token_id)
        metrics = self.log.metrics(iteration, metrics, sizes_of(batch, metrics))
        self.state["signs"] = followed(self.state.get("signs", {}), signs(config, metrics))
        found = self.silences(metrics) if iteration % silence.EVERY == 0 or last else {}
        self.finished, self.kept, self.ahead = iteration, copy.deepcopy(self.state), False  # in this order
        if last or (iteration + 1) % config.save_every == 0 or self.hopeless(found):
            self.log.save(iteration, self.policy, self.optimizer, self.state)
        if self.log.table:  # where nobody reads any more showing is an error, and nothing is lost
            chosen = self.log.table.choose(len(batch.trajectories))
            shown = {"iteration": iteration, **metrics}
            self.log.table.show(shown, sample(iteration, self.tokenizer, batch, chosen))
        else:
            self.log.show(iteration, metrics, hours.left(config, metrics, iteration, self.evaluation))
        if iteration == self.log.first_iteration and not last and self.processes.rank == 0:
            plan = partial(Plan, config, self.policy.config, processes=self.processes.count)
            print(hours.after_an_iteration(config, metrics, iteration, self.evaluation, plan))
        self.warn(found)
        if self.interrupted:
            raise KeyboardInterrupt
        if not last:
            self.count_failures(metrics)

    def count_failures(self, metrics: Metrics) -> None:
        """A rollout of few episodes is too small to tell 5% from a fifth, so that all of them are counted together.
        Raises GameFailure."""
        self.failed += round(metrics["rollout/failed"])
        self.tried += round(sum(metrics[name] for name in ("rollout/failed", "episodes", "rollout/too_long")))
        if self.failed > (most := most_failed(self.tried, self.config.rollouts)):
            share = f"{self.failed} of {self.tried} episodes failed"
            raise GameFailure(f"{share} since this command began, and no more than {most} may: the log names them")

    def move(self, *_) -> None:
        """Called before each step of the optimizer."""
        self.ahead = True

    def silences(self, metrics: Metrics) -> dict[str, str]:
        """What is wrong with this iteration; since when is kept with the run."""
        found, before = silences(self.config, metrics), self.state.get("silent", {})
        found |= fall(self.config, self.state["signs"])
        self.state["silent"] = {kind: before.get(kind, self.iteration) for kind in found}
        return found

    def warn(self, found: dict[str, str]) -> None:
        """Says what is wrong, and since when. With --strict that ends the run, whose last iteration is saved."""
        for kind, words in found.items():
            since = self.state["silent"][kind]
            self.processes.print(f"WARNING (since iteration {since}): {words}")
        if kinds := self.hopeless(found):
            if self.processes.rank:
                sys.exit(1)  # the first one says why
            raise Mendable(f"--strict, and nothing is learnt: {', '.join(kinds)}")

    def hopeless(self, found: dict[str, str]) -> list[str]:
        """The kinds that end a run with --strict."""
        return [kind for kind in found if kind not in silence.PARTIAL] if self.config.strict else []


def start(config: Config) -> Run:
    """Load everything, or go on from a checkpoint. Raises ValueError, OSError or ImportError where that fails."""
    config.check_trainable()
    accelerator = accelerator_of(config)
    processes, device = Processes(accelerator), accelerator.device
    if config.fit:
        config, chosen = fitted(config, processes.count)
        processes.print(chosen)
    offload = Offload(device, config.offload)
    make_env, games = environment(config), games_of(config, "train")
    held_out = held_out_games(config)  # missing data are best noticed before hours of work
    check_first_game(make_env, games, config.max_steps, config.context, config.levels)
    if config.writes_skills:  # a template with other fields is best noticed before the first rollout
        analysis_prompt(Trajectory("", 0, [], False), 1, make_env().analysis_prompt())
    if min(config.tasks, len(games)) < config.least_tasks * processes.count:
        each = "one" if config.least_tasks == 1 else "two"
        raise ValueError(f"{config.tasks} --tasks of {len(games)} games: fewer than {each} for each process")
    log = RunLog(config, accelerator)  # refuses a folder that holds another run before anything is loaded
    place = "cpu" if config.shard else device  # a sharded model never is on the device as a whole
    model, tokenizer = load_model(config.model, env=config.env, dtype=config.dtype)
    data = fingerprints(make_env(), {"train": games, **held_out})
    began = log.start(model, data | {"tokenizer": checkpoints.reading(tokenizer)})
    torch.manual_seed(config.seed)
    check_positions(model, config.longest)  # before it is on a GPU
    # The policy is not wrapped for data parallelism: gradients are summed in the update, so that processes may hold
    # different numbers of micro-batches, and `generate` is the model's own.
    policy = (add_lora(model, config.lora_rank) if config.lora_rank else model).to(place)
    check_model(policy, config.context_limit)
    config.check_model(policy)
    if log.first_iteration >= config.iterations:
        made = f"{log.first_iteration} iterations are made already, and --iterations is {config.iterations}"
        processes.print(f"{made}: nothing more is trained")
    for note in notes(config, policy):
        processes.print(note)
    processes.print(planned(config, policy, processes.count))
    processes.print(f"sampling: {sampling_note(policy, reuse_cache=config.reuse_cache)}")
    models = {"policy": policy, "old": policy}  # the policy does not change until the update
    if config.reads("reference"):
        models["reference"] = frozen_copy(policy, config.frozen_dtype, mixed_precision=config.mixed_precision)
    models |= config.further_models(tokenizer, place)
    frozen = [model for model in models.values() if isinstance(model, torch.nn.Module) and model is not policy]
    if config.shard:
        with accelerator.autocast():
            shard([policy, *frozen], device)
    if config.gradient_checkpointing:
        policy.gradient_checkpointing_enable()
        policy.enable_input_require_grads()
    trained = [p for p in policy.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=config.learning_rate, weight_decay=config.weight_decay)
    ends = end_of_turn_ids(policy, tokenizer)
    encoder = Encoder(tokenizer, config.context, began["date"], config.template_options, ends)
    run = Run(
        config, processes, log, policy, tokenizer, encoder, models, optimizer, offload, make_env, games, config.levels
    )
    if config.writes_skills:
        run.writer = that_may_fail(writer_of(run)) if config.skills_may_fail else writer_of(run)
    run.state, run.finished = log.restore(policy, optimizer) or {}, log.first_iteration - 1
    optimizer.register_step_pre_hook(run.move)
    offload.rest(*frozen, optimizer)
    if config.eval_every and log.first_iteration == 0:
        run.evaluate()
    return run


def notes(config: Config, policy) -> list[str]:
    """What is worth a line before the first iteration: given adapters, weights without any, untrained positions."""
    base, lines = base_of(config.model), []
    if base is not None:
        then = "all weights are trained"
        if config.lora_rank:
            then = "new adapters are trained; the reference (adapters off) is what was given, not the base"
        lines += [f"{config.model} holds adapters of {base}: merged into it in float32; {then}"]
    limits = {"--context-limit": config.context_limit}
    if config.longest > config.context_limit:
        limits["--skill-context-limit"] = config.longest
    rates = [learning_rate(config, iteration) / config.learning_rate for iteration in range(config.iterations)]
    if max(rates) < 0.5:
        lines += [
            f"WARNING: the learning rate reaches {max(rates):.1%} of its peak: --warmup {config.warmup} is too long"
        ]
    elif rates[-1] < 0.001:
        lines += [
            f"WARNING: the learning rate ends at {rates[-1]:.0e} of its peak: raise --lr-halving {config.lr_halving}"
        ]
    without = left_out(policy) if config.lora_rank else None
    return lines + [line for line in (without, untrained_positions(policy, limits)) if line]


def learning_rate(config: Config, iteration: int) -> float:
    """Linear warm-up, then halved every `lr_halving` iterations. It doesn't depend on --iterations, so a run can be
    prolonged and still is the same run."""
    decay = 0.5 ** (iteration / config.lr_halving) if config.lr_halving else 1.0
    return config.learning_rate * min(1.0, (iteration + 1) / max(1, config.warmup)) * decay


def writer_of(run: Run) -> Writer:
    """One of this run's own models, an endpoint, or a function of the user's."""
    config = run.config
    if config.skill_writer == "openai":
        assert config.openai_model is not None  # the config asks for both together
        return openai_writer(
            config.openai_model,
            base_url=config.openai_base_url,
            max_new_tokens=config.skill_tokens,
            temperature=config.skill_temperature,
        )
    if ":" in config.skill_writer:
        return import_writer(config.skill_writer)
    return model_writer(
        run.models[config.skill_writer],
        run.encoder,
        max_new_tokens=config.skill_tokens,
        temperature=config.skill_temperature,
        context_limit=config.skill_context_limit or config.context_limit,
        prefill=config.skill_prefill,
        rollout_budget=config.rollout_budget,
        token_budget=config.token_budget,
    )
