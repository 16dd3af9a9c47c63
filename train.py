"""OPID in plain PyTorch: rollout -> skills -> router -> rescore -> advantage -> update.

python train.py                                    # the laptop default: tiny model, fast ALFWorld, no GPU
python train.py --recipe alfworld-qwen2.5-3b       # the paper's settings
accelerate launch train.py --recipe ...            # many GPUs: each plays its share; with --shard it holds one

`method.` marks the places where another --algo departs from OPID (baselines/method.py); for OPID, and for GRPO, which
is OPID without skills, each of them leaves all as it is.
"""

from __future__ import annotations

import copy
import math
import random
import sys

import torch
from torch import Tensor
from tqdm import tqdm

from advantage import combine, outcome_advantage, skill_advantage, sum_of_scored, where_scored
from baselines import METHODS, Method
from baselines.controls import counterparts
from baselines.distillation import only_contexts
from baselines.divergences import distances
from baselines.method import lambdas
from config import Config, parse_args
from data import Batch, Guidance, Skills, Trajectory
from evaluate import environment, evaluate_everywhere, games_of, held_out_games
from lm.encoder import Encoder
from lm.loading import add_lora, frozen_copy
from lm.logprobs import sequence_logprobs
from lm.obstacles import check_model, check_positions, sampling_note
from lm.offload import Offload
from lm.packing import Sequence, micro_batches, pack
from lm.parallel import clip_gradients, even, gathered, shard, sum_gradients
from lm.sampler import Sampler, check_gap, logprob_gap
from lm.scoring import layout_noise
from lm.states import States, expected_shift, states_and_logprobs, states_obstacle
from lm.writers import Writer, import_writer, model_writer, openai_writer
from rescore import guided_contexts, response_logprobs, score
from rollout import rollout
from router import asks_for, route
from runlog import RunLog, accelerator_of
from runlog.memory import peak_mib
from runlog.metrics import Metrics, advantage_metrics, silent_groups, sizes_of, timed
from runlog.plan import line, told
from skills import write_skills
from tiny.loading import load_model

Routes = list[list[tuple[Guidance, ...]]]  # of each trajectory, of each of its steps
Contexts = dict[str, list[list[int] | None]]  # h^ by level: B of them

MAX_LOG_RATIO = 20.0  # of a token's two probabilities, so that no exp overflows: infinity times A = 0 is not a number
NOISE_TRAJECTORIES = 2  # that the noise floor is measured on: every step of them is scored alone, once a run


def train(config: Config, run: Run | None = None) -> RunLog:
    """The whole run. A function of config and seed: every iteration seeds itself, so that resuming is exact."""
    run = run or Run(config)
    for iteration in range(run.log.first_iteration, config.iterations):
        rng = run.seed(iteration)
        trajectories, played = run.rollout(iteration, rng)
        skills, written = run.write_skills(trajectories, rng)
        routes = run.route(trajectories, skills)
        others = run.others(trajectories, skills, routes, rng)  # None, but with --shift-base other
        batch, scored = run.rescore(trajectories, routes, iteration, others)
        updated = run.update(batch, iteration, rng)
        run.finish(iteration, trajectories, skills, routes, batch, played | written | scored | updated)
    run.log.finish(run.policy, run.tokenizer)
    return run.log


def policy_loss(
    new: Tensor, old: Tensor, advantages: Tensor, clip: float, dual_clip: float | None = None
) -> tuple[Tensor, Tensor]:
    """PPO-clip per token. All (N,) -> (N,), and where the clipped branch, which carries no gradient, is the smaller.

    `dual_clip` c bounds the loss of a token with A < 0 by -c A (arXiv 1912.09729; authors' release:
    verl/trainer/ppo/core_algos.py, compute_policy_loss, c = 3).
    """
    # L = -min(r A, clip(r, 1 - eps, 1 + eps) A),  r = pi_theta(y | h) / pi_old(y | h)
    ratio = (new - old).clamp(max=MAX_LOG_RATIO).exp()  # (N,)
    unclipped, clipped = ratio * advantages, ratio.clamp(1 - clip, 1 + clip) * advantages  # (N,)
    losses = -torch.minimum(unclipped, clipped)  # (N,)
    if dual_clip is not None:
        losses = torch.where(advantages < 0, torch.minimum(losses, -dual_clip * advantages), losses)
    return losses, (clipped < unclipped).float()


def k3(new: Tensor, reference: Tensor, bound: float | None = None) -> Tensor:
    """KL(pi_theta || pi_ref) per token, by Schulman's k3 on sampled tokens. Never negative. (N,) -> (N,)

    `bound`: the most that a token counts; beyond it a token carries no gradient (the release: kl_penalty, 10).
    """
    # KL = exp(d) - 1 - d,  d = log pi_ref(y | h) - log pi_theta(y | h)
    d = reference - new  # (N,)
    kl = d.clamp(max=MAX_LOG_RATIO).exp() - 1 - d  # (N,)
    return kl if bound is None else kl.clamp(max=bound)


def outcome_of(method: Method, trajectories: list[Trajectory]) -> tuple[Tensor, Metrics]:
    """A_ep of each step (B,): R(tau), less the step's own penalty, against its group; and metrics."""
    config, groups = method.config, [trajectory.group for trajectory in trajectories]
    rewards = [config.success_reward * trajectory.success for trajectory in trajectories]  # R(tau)
    steps = [(i, step) for i, trajectory in enumerate(trajectories) for step in trajectory.steps]
    penalties = torch.tensor([config.invalid_penalty * (not step.valid) for _, step in steps])  # (B,)
    returns = torch.tensor([rewards[i] for i, _ in steps]) - penalties  # (B,)
    group, owner = torch.tensor([groups[i] for i, _ in steps]), torch.tensor([i for i, _ in steps])  # (B,) each
    outcome = outcome_advantage(returns, group, owner, normalize=config.normalize, over=config.group_over)  # (B,)
    silent = silent_groups(groups, rewards).values()
    outcome, metrics = method.outcome(outcome, trajectories)
    return outcome, {"advantage/silent_groups": sum(silent) / max(1, len(silent))} | metrics


def make_batch(
    method: Method,
    contexts: list[list[int]],
    responses: list[list[int]],
    outcome: Tensor,  # (B,) A_ep
    plain: dict[str, Tensor],  # (B, R) log pi(y | h) by reader
    guided: dict[str, Tensor],  # (B, R) log pi(y | h^) by level, NaN where a step has no skill of it
    iteration: int,
    bases: dict[str, Tensor] | None = None,  # (B, R) by level; None: of `plain`, by --shift-base
) -> Batch:
    """The advantage of every token, from its outcome and its log-probs."""
    config, old, mask = method.config, plain["old"], ~plain["old"].isnan()  # (B, R)

    # A_skill = (log pi(y | h^) - log pi_old(y | h)) * m
    bases = bases or dict.fromkeys(guided, plain[base_of(config)])  # (B, R) each
    shifts = {level: skill_advantage(guided[level], base, mask) for level, base in bases.items()}  # (B, R) each
    scored = [where_scored(shift, guided[level] - bases[level]) for level, shift in shifts.items()]

    # A = A_ep + lambda_ep A_skill [episode-guided] + lambda_step A_skill [step-guided]
    weights = {f"{level}_weight": weight for level, weight in lambdas(config, iteration).items()}
    sampled = shifts if config.divergence == "sampled" else {}  # else the loss holds it
    episode, step = sampled.get("episode"), sampled.get("step")  # (B, R) each, or None
    advantages = combine(outcome, episode, step, mask, **weights, skill_clip=config.skill_clip)  # (B, R)
    reference = plain.get("reference")  # (B, R), None without a KL term
    batch = Batch(contexts, responses, mask, old, reference, sum_of_scored(mask, *scored), advantages)
    return method.adjust(batch, outcome, plain, guided, iteration)


def base_of(config: Config) -> str:
    """The reader whose log pi(y | h) a skill's is compared with."""
    return config.scorer if config.levels and config.shift_base == "scorer" else "old"


class Run:
    """What lasts from one iteration to the next: policy, optimizer, frozen models, games, log."""

    def __init__(self, config: Config):
        self.config, self.method = config, METHODS[config.algo](config)
        config.check_trainable()
        self.accelerator = accelerator_of(config)
        self.offload = Offload(self.accelerator.device, config.offload)
        self.make_env, self.games = environment(config), games_of(config, "train")
        held_out_games(config)
        needed = 2 if config.exchanges else 1
        if min(config.tasks, len(self.games)) < needed * self.accelerator.num_processes:
            raise ValueError(
                f"{config.tasks} --tasks of {len(self.games)} games: fewer than "
                + ("one for each process" if needed == 1 else "two for each process, whose skills are exchanged")
            )
        self.log = RunLog(config, self.accelerator)  # refuses a folder that holds another run before anything is loaded
        device, self.main = self.accelerator.device, self.accelerator.is_main_process
        place = "cpu" if config.shard else device  # a sharded model never is on the device as a whole
        model, self.tokenizer = load_model(config.model, env=config.env, dtype=config.dtype)
        start = self.log.start(model)
        torch.manual_seed(config.seed)
        check_positions(model, config.longest)  # before it is on a GPU
        # The policy is not wrapped for data parallelism: gradients are summed in `_step`, so that processes may
        # hold different numbers of micro-batches, and `generate` is the model's own.
        self.policy = (add_lora(model, config.lora_rank) if config.lora_rank else model).to(place)
        check_model(self.policy, config.context_limit)
        if (needs := config.needs_states) and (obstacle := states_obstacle(self.policy)):
            raise ValueError(f"{needs} needs whole distributions, which {config.model} does not give: {obstacle}")
        self.accelerator.print(line(config, self.policy, self.accelerator.num_processes))
        self.accelerator.print(f"sampling: {sampling_note(self.policy, reuse_cache=config.reuse_cache)}")
        # by the names that --scorer and --skill-writer use; the policy does not change until the update
        self.models = {"policy": self.policy, "old": self.policy}
        if config.reads("reference"):
            self.models["reference"] = frozen_copy(
                self.policy, config.frozen_dtype, mixed_precision=config.mixed_precision
            )
        if config.reads("ema"):
            self.models["ema"] = copy.deepcopy(self.policy).requires_grad_(False).eval()
        self.further = self.method.load(self.tokenizer, place)
        others = [self.models[name] for name in ("reference", "ema") if name in self.models] + [*self.further.values()]
        self.frozen = [model for model in others if isinstance(model, torch.nn.Module)]  # with weights of their own
        if config.shard:
            with self.accelerator.autocast():
                shard([self.policy, *self.frozen], device)
        if config.gradient_checkpointing:
            self.policy.gradient_checkpointing_enable()
            self.policy.enable_input_require_grads()
        self.trained = [p for p in self.policy.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.trained, lr=config.learning_rate, weight_decay=config.weight_decay)
        self.encoder = Encoder(self.tokenizer, config.context, start["date"])
        self.writer = self._writer() if config.writes_skills else None
        self.log.restore(self.policy, self.optimizer, self.models.get("ema"), self.method)
        self.offload.rest(*self.frozen, self.optimizer)
        if config.eval_every and self.log.first_iteration == 0:
            self.evaluate(-1)

    def seed(self, iteration: int) -> random.Random:
        """Seeds PyTorch for this iteration and process -> the random numbers that all processes share."""
        rank = self.accelerator.process_index
        torch.manual_seed(self.config.seed * 1_000_003 + iteration * 1009 + rank)
        return random.Random(f"{self.config.seed} {iteration}")

    # ---- 1. rollout ----------------------------------------------------------------------------------------------

    @timed("rollout")
    def rollout(self, iteration: int, rng: random.Random) -> tuple[list[Trajectory], Metrics]:
        """This process's share of the iteration's tasks, each played N times."""
        config, share = self.config, self.accelerator
        games = rng.sample(self.games, min(config.tasks, len(self.games)))
        mine = games[share.process_index :: share.num_processes]
        sampling = {"max_new_tokens": config.max_new_tokens, "temperature": config.temperature}
        how = {"reuse_cache": config.reuse_cache, "record": iteration == 0}
        sampler = Sampler(self.policy, self.tokenizer, **sampling, **config.budgets, **how)
        with self._bar("rollout") as bar, self.accelerator.autocast(), gathered(self.policy):
            trajectories, metrics = rollout(
                sampler,
                self.encoder,
                self.make_env,
                mine,
                config.rollouts,
                context_limit=config.context_limit,
                episode_skills=self.method.acts_under(),
                progress=lambda waiting, live: bar.set_postfix(waiting=waiting, live=live),
            )
        played = [trajectory for trajectory in trajectories if trajectory.steps]
        if not self._sum(len(played)):  # a process without a share of the tokens goes on with the others
            raise ValueError(
                f"not one first prompt of {len(games)} tasks fits: raise --context-limit or lower --max-new-tokens"
            )
        return played, metrics

    # ---- 2. skill extraction -------------------------------------------------------------------------------------

    @timed("skills")
    def write_skills(self, trajectories: list[Trajectory], rng: random.Random) -> tuple[list[Skills | None], Metrics]:
        """Hindsight skills of each trajectory; None where there are none."""
        config, skills, metrics = self.config, [None] * len(trajectories), {}
        if not (config.levels or config.writes_skills):
            return skills, metrics
        if config.writes_skills:
            writer = self.models.get(config.skill_writer)
            needed = self.offload.needed(*(model for model in self.frozen if model is writer))
            with self.accelerator.autocast(), needed, gathered(writer):
                asked = {"max_step_skills": config.max_step_skills, "template": self.make_env().analysis_prompt()}
                skills, metrics = write_skills(trajectories, self.writer, **asked)
        return self.method.skills(trajectories, skills, rng), metrics

    def _writer(self) -> Writer:
        """One of this run's own models, an endpoint, or a function of the user's."""
        config = self.config
        sampling = {"max_new_tokens": config.skill_tokens, "temperature": config.skill_temperature}
        if config.skill_writer == "openai":
            return openai_writer(config.openai_model, base_url=config.openai_base_url, **sampling)
        if ":" in config.skill_writer:
            return import_writer(config.skill_writer)
        return model_writer(
            self.models[config.skill_writer],
            self.encoder,
            **sampling,
            context_limit=config.skill_context_limit or config.context_limit,
            prefill=config.skill_prefill,
            **config.budgets,
        )

    # ---- 3. routing ----------------------------------------------------------------------------------------------

    def route(self, trajectories: list[Trajectory], skills: list[Skills | None]) -> Routes:
        """Which skill guides which step. With a rule that looks at log-probs they are scored once more for it."""
        config, routes = self.config, []
        mode = config.routing if config.levels else "none"
        asked = self._old_logprobs(trajectories) if asks_for(mode, "logprobs") else [None] * len(trajectories)
        for trajectory, own, logprobs in zip(trajectories, skills, asked, strict=True):
            seen = {"success": trajectory.success, "logprobs": logprobs}
            routes.append(route(own, len(trajectory.steps), mode, levels=config.levels, **seen))
        self.method.check_routes(routes)
        return routes

    def others(
        self, trajectories: list[Trajectory], skills: list[Skills | None], routes: Routes, rng: random.Random
    ) -> Routes | None:
        """The same routes with other tasks' skills, where the shift is the difference to these."""
        asked = self.config.levels and self.config.shift_base == "other"
        return counterparts(routes, skills, trajectories, rng) if asked else None

    def _old_logprobs(self, trajectories: list[Trajectory]) -> list[list[list[float]]]:
        """log pi_old of each token of each step of each trajectory."""
        steps = [step for trajectory in trajectories for step in trajectory.steps]
        sampled = [step.context for step in steps], [step.response for step in steps]
        with self.accelerator.autocast():
            scores = response_logprobs(self.policy, *sampled, **self.config.limits)
        rows = iter([row[: len(step.response)].tolist() for row, step in zip(scores, steps, strict=True)])
        return [[next(rows) for _ in trajectory.steps] for trajectory in trajectories]

    # ---- 4. re-scoring and 5. advantage --------------------------------------------------------------------------

    @timed("rescore")
    def rescore(
        self, trajectories: list[Trajectory], routes: Routes, iteration: int, others: Routes | None = None
    ) -> tuple[Batch, Metrics]:
        """Old, reference and skill-augmented log-probs of the sampled tokens, and the advantage that they make."""
        config = self.config
        steps = [step for trajectory in trajectories for step in trajectory.steps]
        contexts, responses = [step.context for step in steps], [step.response for step in steps]
        with self.accelerator.autocast(), self.offload.needed(*self.frozen):
            asked, metrics = self._guided(trajectories, routes)
            swapped = None if others is None else self._guided(trajectories, others)[0]
            plain, guided, bases, states = self._logprobs(contexts, responses, asked, swapped)
            if iteration == 0:
                largest, mean = logprob_gap([step.logprobs for step in steps], plain["old"])
                check_gap(largest, mean, torch.bfloat16 if config.mixed_precision == "bf16" else self.policy.dtype)
                metrics["rollout/logprob_gap"] = largest
            if config.levels and iteration == 0:
                few = sum(len(trajectory.steps) for trajectory in trajectories[:NOISE_TRAJECTORIES])
                noise = layout_noise(self.policy, contexts[:few], responses[:few], **config.limits)
                metrics["advantage/noise_floor"] = noise
        outcome, outcome_metrics = outcome_of(self.method, trajectories)  # (B,) A_ep
        batch = make_batch(self.method, contexts, responses, outcome, plain, guided, iteration, bases)
        if config.divergence != "sampled":
            batch.teachers = self.method.teachers(states, iteration)
            for _, teacher in batch.teachers:
                teacher.hold()
        if self.method.matches_states:
            batch.guided = only_contexts(len(contexts), *asked.values())
        metrics |= {f"guided/{level}": (~x.isnan()).any(1).float().mean().item() for level, x in guided.items()}
        return batch, metrics | outcome_metrics | advantage_metrics(outcome, batch.skill_advantages, batch.mask)

    def _logprobs(
        self, contexts: list[list[int]], responses: list[list[int]], guided: Contexts, swapped: Contexts | None
    ) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Tensor], dict[str, States]]:
        """Log-probs (B, R): of the plain contexts by reader, of the skill-augmented ones by level, and by level what
        these are compared with. And the hidden states behind the first two, where whole distributions are needed.
        `swapped`: `guided` with other tasks' skills."""
        config, base = self.config, base_of(self.config)
        names = dict.fromkeys(["old", base] + (["reference"] if config.pulled else []))
        readers = {name: self.models[name] for name in names} | self.further
        scorer = self.models[config.scorer] if guided else None
        how = config.limits | {"progress": lambda name: lambda batches: self._bar(f"score {name}", batches)}
        centred = bool(guided) and config.centred
        states = {} if config.needs_states else None
        plain, scored = score(readers, scorer, contexts, responses, guided, **how, keep=states)
        bases = dict.fromkeys(scored, plain[base])
        if swapped is not None:
            foreign = {} if centred else None
            _, bases = score({}, scorer, contexts, responses, swapped, **how, keep=foreign)
        for level in scored if centred else ():
            to = states[base] if swapped is None else foreign[level]
            bases[level] = bases[level] + expected_shift(states["old"], states[level], to, config.temperature)
        return plain, scored, bases, states or {}

    def _guided(self, trajectories: list[Trajectory], routes: Routes) -> tuple[Contexts, Metrics]:
        """The skill-augmented contexts by level."""
        guided, metrics = {}, {}
        for level in self.config.levels:
            guided[level], metrics[f"guided/{level}_too_long"] = guided_contexts(
                self.encoder, trajectories, routes, level, context_limit=self.config.context_limit
            )
        return guided, metrics

    # ---- 6. update -----------------------------------------------------------------------------------------------

    @timed("update")
    def update(self, batch: Batch, iteration: int, rng: random.Random) -> Metrics:
        """PPO-clip over mini-batches of packed sequences. One token denominator per mini-batch, over all processes."""
        config = self.config
        sequences = pack(batch.contexts, batch.responses)
        steps = self._sum(len(batch.responses))
        parts = max(1, round(steps / config.mini_batch)) if config.mini_batch else 1
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(config, iteration)
        taken: list[Metrics] = []
        teaching = self.frozen if batch.teachers or self.method.matches_states else []
        with self._bar("update", total=config.epochs * parts) as bar, self.offload.needed(self.optimizer, *teaching):
            for _ in range(config.epochs):
                rng.shuffle(sequences)
                for part in range(parts):
                    taken += [self._step(sequences[part::parts], batch)]
                    bar.update()
        taken = [metrics for metrics in taken if metrics]  # without mini-batches that had no tokens on any process
        finite = [metrics for metrics in taken if math.isfinite(metrics["grad_norm"])]
        if not finite:
            raise FloatingPointError(
                f"every gradient of this iteration was infinite or no number: the last checkpoint in {config.out}/"
                "checkpoints is from before. Try --resume with a lower --learning-rate"
            )
        if ema := self.models.get("ema"):
            for slow, fast in zip(ema.parameters(), self.policy.parameters(), strict=True):
                slow.lerp_(fast.detach().to(slow.device), 1 - config.ema_decay)
        means = {name: sum(metrics[name] / len(finite) for metrics in finite) for name in finite[0]}
        return means | {"update/skipped": len(taken) - len(finite)}

    def _step(self, sequences: list[Sequence], batch: Batch) -> Metrics:
        """One optimizer step -> mean per token of each loss term, clip fraction, gradient norm; nothing where no
        process had a token. A step whose gradient is not finite is not taken."""
        tokens = self._sum(sum(size for sequence in sequences for _, _, size in sequence.responses))
        if not tokens:  # more mini-batches than sequences, on every process alike
            return {}
        self.policy.train()
        names = ["loss/policy", "loss/kl", "clip_fraction"]
        names += ["loss/distill"] if self.method.loss_weight or batch.teachers else []
        zero = torch.zeros((), device=self.accelerator.device)
        sums = dict.fromkeys(names, zero)  # of each term, over this process's tokens, of which it may have none
        for micro in even(micro_batches(sequences, self.config.token_budget), self.policy):
            losses, terms = self.losses(micro, batch)  # (N,)
            (losses.sum() / tokens).backward()
            sums = {name: sums[name] + term.detach().sum() for name, term in terms.items()}
        sum_gradients(self.trained)
        norm = clip_gradients(self.trained, self.config.max_grad_norm)
        if norm.isfinite():  # else one such step would spoil weights and moments for good
            self.optimizer.step()
        self.optimizer.zero_grad()
        totals = self.accelerator.reduce(torch.stack(list(sums.values())), reduction="sum")  # (terms,)
        return dict(zip(sums, (totals / tokens).tolist(), strict=True)) | {"grad_norm": norm.item()}

    def losses(self, micro: list[Sequence], batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of each token of a micro-batch (N,), and its terms by the name of their metric (N,)."""
        config, device = self.config, self.accelerator.device
        with self.accelerator.autocast():
            if self.method.matches_states:  # never with OPID
                return self.method.matched(self.policy, self.models.get(config.scorer), micro, batch)
            if batch.teachers:  # never with --divergence sampled
                states, new, rows, columns = states_and_logprobs(self.policy, micro, config.temperature)
                exact = distances(self.policy, states, batch.teachers, (rows.cpu(), columns.cpu()), config)  # (N,)
            else:
                # (N,) log pi_theta(y | h)
                new, rows, columns = sequence_logprobs(self.policy, micro, config.temperature)
        at = rows.cpu(), columns.cpu()
        old, advantages = batch.old_logprobs[at].to(device), batch.advantages[at].to(device)  # (N,)

        # L = PPO-clip(r, A) + beta KL(pi_theta || pi_ref)
        policy, clipped = policy_loss(new, old, advantages, config.clip, config.dual_clip)  # (N,)
        kl = torch.zeros_like(policy)  # (N,)
        if config.pulled:
            kl = k3(new, batch.reference_logprobs[at].to(device), config.kl_clip)
        losses = policy + config.kl * kl
        terms = {"loss/policy": policy, "loss/kl": kl, "clip_fraction": clipped}

        if self.method.loss_weight:  # never with OPID
            teacher = None if batch.teacher_logprobs is None else batch.teacher_logprobs[at].to(device)  # (N,)
            terms["loss/distill"] = self.method.loss(new, old, teacher)  # (N,)
            losses = losses + self.method.loss_weight * terms["loss/distill"]
        if batch.teachers:
            terms["loss/distill"] = exact  # lambda D(pi_theta, pi under the skill)
            losses = losses + exact
        return losses, terms

    # ---- the rest ------------------------------------------------------------------------------------------------

    def finish(
        self,
        iteration: int,
        trajectories: list[Trajectory],
        skills: list[Skills | None],
        routes: Routes,
        batch: Batch,
        metrics: Metrics,
    ) -> None:
        """Evaluate, log, save."""
        config, last = self.config, iteration == self.config.iterations - 1
        if last or (config.eval_every and (iteration + 1) % config.eval_every == 0):
            metrics = metrics | self.evaluate(iteration)
        if iteration == 0:
            peak = torch.tensor(peak_mib(self.accelerator.device), device=self.accelerator.device)
            metrics = metrics | {"memory/peak_mib": self.accelerator.gather(peak[None]).max().item()}
        if iteration % config.sample_every == 0:
            self.log.samples(iteration, self.tokenizer, trajectories, skills, routes, batch)
        self.log.metrics(iteration, metrics, sizes_of(trajectories, skills, batch, metrics))
        if last or (iteration + 1) % config.save_every == 0:
            self.log.save(iteration, self.policy, self.optimizer, self.models.get("ema"), self.method.state())

    @timed("evaluate")
    def evaluate(self, iteration: int) -> Metrics:
        """Held-out success, and its table printed. Iteration -1: the policy before training."""
        with gathered(self.policy):
            success, table = evaluate_everywhere(
                self.policy, self.encoder, self.config, self.accelerator, self.method.acts_under()
            )
        self.log.evaluation(iteration, success, table)
        return {f"eval/{split}/success": share for split, share in success.items()}

    def _sum(self, value: float | Tensor) -> float:
        """Over all processes."""
        value = torch.as_tensor(value, dtype=torch.float32, device=self.accelerator.device)
        return self.accelerator.reduce(value, "sum").item()

    def _bar(self, name: str, batches: list | None = None, total: int | None = None) -> tqdm:
        return tqdm(batches, total=total, desc=name, leave=False, disable=None if self.main else True)


def learning_rate(config: Config, iteration: int) -> float:
    """Linear warm-up, then halved every `lr_halving` iterations. It doesn't depend on --iterations, so a run can be
    prolonged and still is the same run."""
    decay = 0.5 ** (iteration / config.lr_halving) if config.lr_halving else 1.0
    return config.learning_rate * min(1.0, (iteration + 1) / max(1, config.warmup)) * decay


def main() -> None:
    config = parse_args()
    try:
        if config.plan:
            return print(told(config))
        run = Run(config)
    except (ValueError, OSError, ImportError) as error:  # a model, folder, package or setting that cannot be used
        sys.exit(f"train.py: {error}")
    try:
        train(config, run)
    except OSError as error:  # a full disk, a server that is gone
        sys.exit(f"train.py: {error}: when that is mended go on with --resume")


if __name__ == "__main__":
    main()
