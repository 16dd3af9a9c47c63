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

from advantage import advantage_metrics, combine, outcome_advantage, skill_advantage
from config import Config, parse_args
from data import Batch, Guidance, Skills, Trajectory
from evaluate import environment, evaluate, format_table, games_of
from models import add_lora, frozen_copy, load_model
from rescore import (
    Sequence,
    guided_contexts,
    guided_logprobs,
    layout_noise,
    micro_batches,
    pack,
    sequence_logprobs,
    tree_logprobs,
)
from rollout import Encoder, rollout
from router import route
from runlog import RunLog, peak_mib
from sampler import Sampler
from skills import ConversationWriter, Writer, conversation_writer, model_writer, openai_writer, write_skills

NOISE_TRAJECTORIES = 2  # that the noise floor is measured on: every step of them is scored alone, once a run


def train(config: Config) -> RunLog:
    """The whole run. A function of config and seed: every iteration seeds itself, so that resuming is exact."""
    run = Run(config)
    for iteration in range(run.log.first_iteration, config.iterations):
        run.start(iteration)
        trajectories = run.rollout(iteration)
        skills = run.write_skills(trajectories)
        routes = [route(s, len(t.steps), config.routing) for s, t in zip(skills, trajectories, strict=True)]
        batch = run.score(trajectories, routes)
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
        model, tokenizer = load_model(config.model, dtype=config.dtype, seed=config.seed)
        torch.manual_seed(config.seed)
        model = add_lora(model, config.lora_rank) if config.lora_rank else model
        self.model = model.to(self.accelerator.device)
        # The model is not wrapped for data parallelism: gradients are summed in `_step`, so that processes may
        # hold different numbers of micro-batches, and `generate` is the model's own.
        self.reference, self.ema = frozen_copy(self.model), None
        if config.scorer == "ema":
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
        self.log.restore(self.model, self.optimizer, self.ema)
        self.metrics: dict[str, float] = {}
        if config.eval_every and self.log.first_iteration == 0:
            self._evaluate(-1)

    def start(self, iteration: int) -> None:
        rank = self.accelerator.process_index
        torch.manual_seed((config_seed := self.config.seed) * 1_000_003 + iteration * 1009 + rank)
        self.rng = random.Random(f"{config_seed} {iteration}")
        self.metrics, self.iteration = {}, iteration

    # ---- 1. rollout ----------------------------------------------------------------------------------------------

    def rollout(self, iteration: int) -> list[Trajectory]:
        """This process's share of the iteration's tasks, each played N times."""
        config, share = self.config, self.accelerator
        games = self.rng.sample(self.games, min(config.tasks, len(self.games)))
        mine = games[share.process_index :: share.num_processes]
        sampling = {"max_new_tokens": config.max_new_tokens, "temperature": config.temperature}
        goes_on = config.uses_skills and config.skill_transcript == "conversation" and config.skill_writer == "policy"
        self.sampler = Sampler(self.model, self.tokenizer, **sampling, keep_finished=True) if goes_on else None
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
                progress=lambda live, turn: bar.set_postfix(live=live, turn=turn),
            )
        self.metrics |= metrics
        return trajectories

    # ---- 2. skill extraction -------------------------------------------------------------------------------------

    def write_skills(self, trajectories: list[Trajectory]) -> list[Skills | None]:
        """Hindsight skills, by the current weights, the frozen ones or an endpoint; None for each if unused."""
        config = self.config
        if not config.uses_skills:
            return [None] * len(trajectories)
        with self._phase("skills"), self.accelerator.autocast():
            skills, metrics = write_skills(
                trajectories,
                self._writer(trajectories),
                max_step_skills=config.max_step_skills,
                template=self.make_env().analysis_prompt(),
                conversation=config.skill_transcript == "conversation",
            )
        self.sampler = None  # and with it the cache of finished episodes
        self.metrics |= metrics
        return skills

    def _writer(self, trajectories: list[Trajectory]) -> Writer | ConversationWriter:
        config = self.config
        sampling = {"max_new_tokens": config.skill_tokens, "temperature": config.skill_temperature}
        if config.skill_writer == "openai":
            return openai_writer(config.openai_model, base_url=config.openai_base_url, **sampling)
        sampling |= {
            "prefill": config.skill_prefill,
            "context_limit": config.skill_context_limit or config.context_limit,
            "batch_tokens": config.generate_budget,
        }
        author = self.model if config.skill_writer == "policy" else self.reference
        if config.skill_transcript == "prompt":
            return model_writer(author, self.tokenizer, **sampling)
        recall = self.sampler.recall if self.sampler else lambda keys: None  # keys and values are the policy's alone
        return conversation_writer(author, self.encoder, trajectories, recall=recall, **sampling)

    # ---- 4. re-scoring and 5. advantage --------------------------------------------------------------------------

    def score(self, trajectories: list[Trajectory], routes: list[list[tuple[Guidance, ...]]]) -> Batch:
        """Old, reference and skill-augmented log-probs of the sampled tokens, and the advantage that they make."""
        config = self.config
        steps = [step for trajectory in trajectories for step in trajectory.steps]
        contexts, responses = [step.context for step in steps], [step.response for step in steps]
        with self._phase("rescore"), self.accelerator.autocast():
            old, reference, scored = self._logprobs(contexts, responses, self._guided(trajectories, routes))
            if config.uses_skills and self.iteration == 0:
                few = sum(len(trajectory.steps) for trajectory in trajectories[:NOISE_TRAJECTORIES])
                noise = layout_noise(self.model, contexts[:few], responses[:few], temperature=config.temperature)
                self.metrics["advantage/noise_floor"] = noise
        mask = ~old.isnan()  # (B, R)
        shifts, skill_advantages = {}, torch.full_like(old, float("nan"))  # (B, R)
        for level, logprobs in scored.items():
            shifts[level] = skill_advantage(logprobs, old, mask)  # (B, R)
            guided = ~logprobs.isnan()  # (B, R)
            skill_advantages[guided] = skill_advantages[guided].nan_to_num() + shifts[level][guided]
            self.metrics[f"guided/{level}"] = guided.any(1).float().mean().item()
        counts = [len(trajectory.steps) for trajectory in trajectories]
        owner = torch.arange(len(trajectories)).repeat_interleave(torch.tensor(counts))  # (B,)
        outcome = outcome_advantage(
            torch.tensor([trajectories[i].reward for i in owner]) - torch.tensor([step.penalty for step in steps]),
            torch.tensor([trajectories[i].group for i in owner]),
            owner,
            normalize=config.normalize,
            over=config.group_over,
        )  # (B,)
        weights = {"episode_weight": config.episode_weight, "step_weight": config.step_weight}
        advantages = combine(
            outcome, shifts.get("episode"), shifts.get("step"), mask, **weights, skill_clip=config.skill_clip
        )  # (B, R)
        self.metrics |= advantage_metrics(outcome, skill_advantages, mask)
        return Batch(contexts, responses, mask, old, reference, skill_advantages, advantages)

    def _guided(self, trajectories, routes) -> dict[str, list[list[int] | None]]:
        """The skill-augmented context of each step, None where it has none, for each level that is in use."""
        guided, config = {}, self.config
        for level, weight in (("episode", config.episode_weight), ("step", config.step_weight)):
            if config.uses_skills and weight != 0:
                guided[level], self.metrics[f"guided/{level}_too_long"] = guided_contexts(
                    self.encoder, trajectories, routes, level, context_limit=config.context_limit
                )
        return guided

    def _logprobs(self, contexts, responses, guided) -> tuple[Tensor, Tensor | None, dict[str, Tensor]]:
        """Log-probs (B, R): old, reference (None without a KL term), and of each level's guided contexts.

        A step skill changes the end of a context, so it is scored as a branch of the plain contexts, in the same pass
        where the scorer makes one anyway. An episode skill changes all that follows the task: a pass of its own.
        """
        config = self.config
        weights = {"old": self.model, "reference": self.reference, "ema": self.ema}
        scoring = {"temperature": config.temperature, "token_budget": config.token_budget}
        plain = ["old", "reference"] if config.kl else ["old"]
        logprobs, scored = {}, {}
        for name in dict.fromkeys([*plain, *([config.scorer] if "step" in guided else [])]):
            rides = "step" in guided and name == config.scorer
            logprobs[name], branch = tree_logprobs(
                weights[name],
                contexts,
                responses,
                guided["step"] if rides else [None] * len(contexts),
                branches_only=name not in plain,
                **scoring,
                progress=self._bar_of(name),
            )
            if rides:
                scored["step"] = branch
        if "episode" in guided:
            scored["episode"] = guided_logprobs(
                weights[config.scorer], guided["episode"], responses, **scoring, progress=self._bar_of("episode")
            )
        return logprobs["old"], logprobs["reference"] if config.kl else None, scored

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
        sums = torch.zeros(3, device=device)
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
            loss = (policy + config.kl * kl).sum() / tokens
            if not loss.isfinite():
                raise FloatingPointError(
                    f"the loss is {loss.item()}: the last checkpoint in {config.out}/checkpoints is from before. "
                    "Try --resume with a lower --learning-rate"
                )
            loss.backward()
            sums += torch.stack([policy.detach().sum(), kl.detach().sum(), clipped.sum()])
        for parameter in self.trained:
            if self.accelerator.num_processes > 1:
                gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
                parameter.grad = self.accelerator.reduce(gradient, reduction="sum")
        norm = torch.nn.utils.clip_grad_norm_(self.trained, config.max_grad_norm)
        self.optimizer.step()
        self.optimizer.zero_grad()
        policy, kl, clipped = (self.accelerator.reduce(sums, reduction="sum") / tokens).tolist()
        return {"loss/policy": policy, "loss/kl": kl, "clip_fraction": clipped, "grad_norm": norm.item()}

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
            self.log.save(iteration, self.model, self.optimizer, self.ema)

    def close(self) -> None:
        self.log.finish(self.model, self.tokenizer)

    def _evaluate(self, iteration: int) -> None:
        """Held-out success without skills; each process plays its share. Iteration -1: the policy before training."""
        share = {"process": self.accelerator.process_index, "processes": self.accelerator.num_processes}
        with self._phase("evaluate"), self.accelerator.autocast():
            mine = evaluate(self.model, self.encoder, self.config, **share)
        # only outcomes travel: a table needs no steps
        played = [(split, replace(t, steps=[])) for split, trajectories in mine.items() for t in trajectories]
        results = {split: [] for split in mine}
        for split, trajectory in gather_object(played):
            results[split].append(trajectory)
        success = {split: sum(t.success for t in played) / len(played) for split, played in results.items()}
        self.log.evaluation(iteration, success, format_table(results))
        self.metrics |= {f"eval/{split}/success": share for split, share in success.items()}

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


def policy_loss(new: Tensor, old: Tensor, advantages: Tensor, clip: float) -> tuple[Tensor, Tensor]:
    """PPO-clip a token: -min(r A, clip(r, 1 - clip, 1 + clip) A), r = pi_theta / pi_old. All (N,) -> (N,), and where
    the clipped branch, which carries no gradient, was the smaller."""
    ratio = (new - old).exp()
    plain, clipped = ratio * advantages, ratio.clamp(1 - clip, 1 + clip) * advantages
    return -torch.minimum(plain, clipped), (clipped < plain).float()


def k3(new: Tensor, reference: Tensor) -> Tensor:
    """KL(pi_theta || pi_ref) a token, by Schulman's k3 on sampled tokens: exp(d) - 1 - d, d = log pi_ref - log pi_th.
    Never negative. (N,) -> (N,)"""
    d = reference - new
    return d.exp() - 1 - d


def main() -> None:
    config = parse_args()
    if config.plan:
        from tools.plan import format_plan, plan

        print(format_plan(plan(config)))
    else:
        train(config)


if __name__ == "__main__":
    main()
