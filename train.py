"""OPID in plain PyTorch: rollout -> skills -> router -> rescore -> advantage -> update.

python train.py                                    # the laptop default: tiny model, fast ALFWorld, no GPU
python train.py --recipe alfworld-qwen2.5-3b       # the paper's settings
accelerate launch train.py --recipe ...            # many GPUs: each plays its share of the tasks
"""

from __future__ import annotations

import copy
import random
import time
from contextlib import contextmanager
from dataclasses import replace

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor
from tqdm import tqdm

from advantage import advantage_metrics, advantages_of, merge, outcome_of
from baselines.losses import distillation_loss, k3, policy_loss
from baselines.teacher import load_teacher
from config import Config, parse_args
from data import Batch, Guidance, Skills, Trajectory
from evaluate import environment, evaluate, format_table, games_of
from lm.encoder import Encoder
from lm.loading import add_lora, frozen_copy
from lm.packing import Sequence, micro_batches, pack
from lm.sampler import Sampler
from lm.writers import scripted_skills, writer_of
from rescore import layout_noise, sequence_logprobs
from rollout import rollout
from router import route, shuffle_skills
from runlog import RunLog, peak_mib
from scoring import guided_by_level, score
from skills import lessons, remember, write_skills
from tiny.loading import load_model

NOISE_TRAJECTORIES = 2  # that the noise floor is measured on: every step of them is scored alone, once a run


def train(config: Config) -> RunLog:
    """The whole run. A function of config and seed: every iteration seeds itself, so that resuming is exact."""
    run = Run(config)
    for iteration in range(run.log.first_iteration, config.iterations):
        run.start(iteration)
        trajectories = run.rollout()
        skills = run.write_skills(trajectories)
        mode = config.routing if config.levels else "none"
        routes = [route(s, len(t.steps), mode) for s, t in zip(skills, trajectories, strict=True)]
        batch = run.score(trajectories, routes, iteration)
        run.update(batch, iteration)
        run.finish(iteration, trajectories, skills, routes, batch)
    run.close()
    return run.log


class Run:
    """What lasts from one iteration to the next: policy, optimizer, frozen copies, games, log."""

    def __init__(self, config: Config):
        self.config = config
        tracker = None if config.tracker == "none" else config.tracker
        self.accelerator = Accelerator(mixed_precision=config.mixed_precision, log_with=tracker, project_dir=config.out)
        self.log = RunLog(config, self.accelerator)  # refuses a folder that holds another run before anything is loaded
        model, tokenizer = load_model(config.model, env=config.env, dtype=config.dtype, seed=config.seed)
        torch.manual_seed(config.seed)
        model = add_lora(model, config.lora_rank) if config.lora_rank else model
        self.model = model.to(self.accelerator.device)
        # The model is not wrapped for data parallelism: gradients are summed in `_step`, so that processes may
        # hold different numbers of micro-batches, and `generate` is the model's own.
        self.reference, self.ema, self.teacher = frozen_copy(self.model), None, None
        if config.teacher:
            self.teacher = load_teacher(config.teacher, tokenizer, dtype=config.dtype).to(self.accelerator.device)
        if config.keeps_ema:
            self.ema = copy.deepcopy(self.model).requires_grad_(False).eval()
        if config.gradient_checkpointing:
            self.model.gradient_checkpointing_enable()
            self.model.enable_input_require_grads()
        self.trained = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.trained, lr=config.learning_rate, weight_decay=config.weight_decay)
        self.tokenizer, self.encoder = tokenizer, Encoder(tokenizer, config.context)
        self.make_env, self.games = environment(config), games_of(config, "train")
        if min(config.tasks, len(self.games)) < self.accelerator.num_processes:
            raise ValueError("--tasks (and the games there are) must be at least the number of processes")
        self.episode_skills = self.log.restore(self.model, self.optimizer, self.ema)  # task type -> text
        self.metrics: dict[str, float] = {}
        if config.eval_every and self.log.first_iteration == 0:
            self._evaluate(-1)

    def start(self, iteration: int) -> None:
        rank = self.accelerator.process_index
        torch.manual_seed((config_seed := self.config.seed) * 1_000_003 + iteration * 1009 + rank)
        self.rng = random.Random(f"{config_seed} {iteration}")
        self.metrics = {}

    # ---- 1. rollout ----------------------------------------------------------------------------------------------

    def rollout(self) -> list[Trajectory]:
        """This process's share of the iteration's tasks, each played N times."""
        config, share = self.config, self.accelerator
        games = self.rng.sample(self.games, min(config.tasks, len(self.games)))
        mine = games[share.process_index :: share.num_processes]
        sampling = {"max_new_tokens": config.max_new_tokens, "temperature": config.temperature}
        keep = config.keeps_conversations
        self.sampler = Sampler(self.model, self.tokenizer, **sampling, keep_finished=True) if keep else None
        with self._phase("rollout"), self._bar("rollout") as bar, self.accelerator.autocast():
            trajectories, metrics = rollout(
                self.model,
                self.encoder,
                self.make_env,
                mine,
                config.rollouts,
                **sampling,
                context_limit=config.context_limit,
                sampler=self.sampler,
                success_reward=config.success_reward,
                invalid_penalty=config.invalid_penalty,
                episode_skills=self.episode_skills if config.method.acting else None,
                progress=lambda live, turn: bar.set_postfix(live=live, turn=turn),
            )
        self.metrics |= metrics
        return trajectories

    # ---- 2. skill extraction -------------------------------------------------------------------------------------

    def write_skills(self, trajectories: list[Trajectory]) -> list[Skills | None]:
        """Hindsight skills, by one of this run's models or an endpoint; None for each if unused."""
        config = self.config
        if not config.uses_skills:
            return [None] * len(trajectories)
        if config.method.skills == "script":
            return [scripted_skills(trajectory, config.max_step_skills) for trajectory in trajectories]
        recall = {"recall": self.sampler.recall} if self.sampler else {}  # keys and values are the policy's alone
        weights = {"policy": self.model, "reference": self.reference, "ema": self.ema}
        write = writer_of(config, weights, self.encoder, trajectories, **recall)
        with self._phase("skills"), self.accelerator.autocast():
            skills, metrics = write_skills(
                trajectories,
                write,
                max_step_skills=config.max_step_skills,
                template=self.make_env().analysis_prompt(),
                conversation=config.skill_transcript == "conversation",
            )
        self.sampler = None  # and with it the cache of finished episodes
        self.metrics |= metrics
        if config.method.acting:
            self.episode_skills = remember(self.episode_skills, gather_object(lessons(trajectories, skills)))
        if config.method.skills == "shuffled":
            return shuffle_skills(skills, [trajectory.group for trajectory in trajectories], self.rng)
        return skills

    # ---- 4. re-scoring and 5. advantage --------------------------------------------------------------------------

    def score(self, trajectories: list[Trajectory], routes: list[list[tuple[Guidance, ...]]], iteration: int) -> Batch:
        """Old, reference and skill-augmented log-probs of the sampled tokens, and the advantage that they make."""
        config = self.config
        steps = [step for trajectory in trajectories for step in trajectory.steps]
        contexts, responses = [step.context for step in steps], [step.response for step in steps]
        with self._phase("rescore"), self.accelerator.autocast():
            plain, scored = self._logprobs(contexts, responses, trajectories, routes)
            if config.levels and iteration == 0:
                few = sum(len(trajectory.steps) for trajectory in trajectories[:NOISE_TRAJECTORIES])
                noise = layout_noise(self.model, contexts[:few], responses[:few], temperature=config.temperature)
                self.metrics["advantage/noise_floor"] = noise
        outcome, metrics = outcome_of(config, trajectories)  # (B,)
        mask = ~plain["old"].isnan()  # (B, R)
        base = plain[config.base]  # (B, R)
        advantages, skill_advantages = advantages_of(config, iteration, outcome, plain["old"], scored, base)
        self.metrics |= metrics | {f"guided/{k}": (~v.isnan()).any(1).float().mean().item() for k, v in scored.items()}
        self.metrics |= advantage_metrics(outcome, skill_advantages, mask)
        teacher = merge(mask, *scored.values()) if config.method.distill else None  # (B, R)
        return Batch(
            contexts, responses, mask, plain["old"], plain.get("reference"), skill_advantages, advantages, teacher
        )

    def _logprobs(self, contexts, responses, trajectories, routes) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Log-probs (B, R): of the plain contexts by whose weights, of the skill-augmented ones by level. A larger
        teacher counts as a level: it takes the place of a skill."""
        config = self.config
        guided, metrics = guided_by_level(
            self.encoder, trajectories, routes, config.levels, context_limit=config.context_limit
        )
        self.metrics |= metrics
        weights = {"old": self.model, "reference": self.reference, "ema": self.ema, "teacher": self.teacher}
        plain, scored = score(
            weights,
            contexts,
            responses,
            guided,
            plain=config.plain_scores,
            scorer=config.scorer,
            progress=self._bar_of,
            temperature=config.temperature,
            token_budget=config.token_budget,
        )
        return plain, scored | ({"teacher": plain["teacher"]} if config.method.teacher else {})

    # ---- 6. update -----------------------------------------------------------------------------------------------

    def update(self, batch: Batch, iteration: int) -> None:
        """PPO-clip over mini-batches of packed sequences. One token denominator a mini-batch, over all processes."""
        config = self.config
        sequences = pack(batch.contexts, batch.responses)
        steps = self._sum(len(batch.responses))
        parts = max(1, round(steps / config.mini_batch)) if config.mini_batch else 1
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(config, iteration)
        totals: dict[str, float] = {}
        with self._phase("update"), self._bar("update", total=config.epochs * parts) as bar:
            for _ in range(config.epochs):
                self.rng.shuffle(sequences)
                for part in range(parts):
                    for name, value in self._step(sequences[part::parts], batch).items():
                        totals[name] = totals.get(name, 0.0) + value / (parts * config.epochs)
                    bar.update()
        if self.ema is not None:
            for slow, fast in zip(self.ema.parameters(), self.model.parameters(), strict=True):
                slow.lerp_(fast.detach(), 1 - config.ema_decay)
        self.metrics |= totals

    def _step(self, sequences: list[Sequence], batch: Batch) -> dict[str, float]:
        """One optimizer step -> mean a token of each loss term, clip fraction, gradient norm."""
        config, device = self.config, self.accelerator.device
        tokens = self._sum(sum(size for sequence in sequences for _, _, size in sequence.responses))
        sums = torch.zeros(4, device=device)
        if not tokens:  # more mini-batches than sequences, on every process alike
            return {}
        self.model.train()
        for micro in micro_batches(sequences, config.token_budget):
            with self.accelerator.autocast():
                new, rows, columns = sequence_logprobs(self.model, micro, config.temperature)  # (N,)
            at = rows.cpu(), columns.cpu()
            old, advantages = batch.old_logprobs[at].to(device), batch.advantages[at].to(device)  # (N,)
            policy, clipped = policy_loss(new, old, advantages, config.clip)
            reference = batch.reference_logprobs[at].to(device) if config.kl else None
            kl = k3(new, reference) if config.kl else torch.zeros_like(policy)
            losses, distill = policy + config.kl * kl, torch.zeros_like(policy)  # (N,)
            if kind := config.method.distill:
                teacher = batch.teacher_logprobs[at].to(device)  # (N,)
                distill = distillation_loss(kind, new, old, teacher, beta=config.gate_beta)  # (N,)
                losses = losses + config.distill_weight * distill
            loss = losses.sum() / tokens
            if not loss.isfinite():
                raise FloatingPointError(
                    f"the loss is {loss.item()}: the last checkpoint in {config.out}/checkpoints is from before. "
                    "Try --resume with a lower --learning-rate"
                )
            loss.backward()
            sums += torch.stack([term.detach().sum() for term in (policy, kl, clipped, distill)])
        for parameter in self.trained:
            if self.accelerator.num_processes > 1:
                gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
                parameter.grad = self.accelerator.reduce(gradient, reduction="sum")
        norm = torch.nn.utils.clip_grad_norm_(self.trained, config.max_grad_norm)
        self.optimizer.step()
        self.optimizer.zero_grad()
        policy, kl, clipped, distill = (self.accelerator.reduce(sums, reduction="sum") / tokens).tolist()
        means = {"loss/policy": policy, "loss/kl": kl, "clip_fraction": clipped, "grad_norm": norm.item()}
        return means | ({"loss/distill": distill} if config.method.distill else {})

    # ---- the rest ------------------------------------------------------------------------------------------------

    def finish(self, iteration, trajectories, skills, routes, batch) -> None:
        """Evaluate, log, save."""
        config, last = self.config, iteration == self.config.iterations - 1
        if last or (config.eval_every and (iteration + 1) % config.eval_every == 0):
            self._evaluate(iteration)
        if iteration == 0:
            peak = torch.tensor(peak_mib(self.accelerator.device), device=self.accelerator.device)
            self.metrics["memory/peak_mib"] = self.accelerator.gather(peak[None]).max().item()
        if iteration % config.sample_every == 0:
            self.log.samples(iteration, self.tokenizer, trajectories, skills, routes, batch)
        self.log.metrics(iteration, self.metrics)
        if last or (iteration + 1) % config.save_every == 0:
            self.log.save(iteration, self.model, self.optimizer, self.ema, self.episode_skills)

    def close(self) -> None:
        self.log.finish(self.model, self.tokenizer)

    def _evaluate(self, iteration: int) -> None:
        """Held-out success without skills, and with those that training acts under; each process plays its share.
        Iteration -1: the policy before training."""
        with self._phase("evaluate"), self.accelerator.autocast():
            mine = self._evaluate_share()
            if self.episode_skills:
                skilled = self._evaluate_share(episode_skills=self.episode_skills)
                mine |= {f"{split.removeprefix('valid_')}+skill": played for split, played in skilled.items()}
        # only outcomes travel: a table needs no steps
        played = [(split, replace(t, steps=[])) for split, trajectories in mine.items() for t in trajectories]
        results = {split: [] for split in mine}
        for split, trajectory in gather_object(played):
            results[split].append(trajectory)
        success = {split: sum(t.success for t in played) / len(played) for split, played in results.items()}
        self.log.evaluation(iteration, success, format_table(results))
        self.metrics |= {f"eval/{split}/success": share for split, share in success.items()}

    def _evaluate_share(self, **playing) -> dict[str, list[Trajectory]]:
        share = {"process": self.accelerator.process_index, "processes": self.accelerator.num_processes}
        return evaluate(self.model, self.encoder, self.config, **share, **playing)

    def _sum(self, value: float) -> float:
        return self.accelerator.reduce(torch.tensor(float(value), device=self.accelerator.device), "sum").item()

    def _bar(self, name: str, total: int | None = None):
        return tqdm(total=total, desc=name, leave=False, disable=None if self.accelerator.is_main_process else True)

    def _bar_of(self, name: str):
        main = self.accelerator.is_main_process
        return lambda batches: tqdm(batches, desc=f"score {name}", leave=False, disable=None if main else True)

    @contextmanager
    def _phase(self, name: str):
        started = time.perf_counter()
        yield
        key = f"seconds/{name}"
        self.metrics[key] = self.metrics.get(key, 0.0) + time.perf_counter() - started


def learning_rate(config: Config, iteration: int) -> float:
    """Linear warm-up, then halved every `lr_halving` iterations. It doesn't depend on --iterations, so a run can be
    prolonged and still is the same run."""
    decay = 0.5 ** (iteration / config.lr_halving) if config.lr_halving else 1.0
    return config.learning_rate * min(1.0, (iteration + 1) / max(1, config.warmup)) * decay


def main() -> None:
    config = parse_args()
    if config.plan:
        from runlog.plan import format_plan, plan

        print(format_plan(plan(config)))
    else:
        train(config)


if __name__ == "__main__":
    main()
