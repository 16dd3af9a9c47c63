"""The update alone, ours and TRL's: what lab/benchmarks/iteration.py --trl calls.

Both sides get the same model folder, prompt ids, completion ids and advantages, and take one optimizer step a repeat:
forward, loss, backward, clipping, AdamW. Ours also reads old log-probs; TRL takes its new ones for them, as it does
where a batch is one step. Each runs in a process of its own, so that its peak memory is its own. Without a KL term on
both sides, since TRL would compute the reference's log-probs outside of its update.

TRL gets a virtual environment (lab/benchmarks/.trl-venv, git-ignored) that sees the packages of this one and adds
nothing but `trl`: the same torch and transformers on both sides.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import sysconfig
import time
import venv
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent.parent))

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from config import Config
from evaluate import environment, games_of
from lm.encoder import Encoder
from lm.loading import save_policy
from lm.sampler import Sampler
from lm.scoring import micro_batches, pack, response_logprobs, sequence_logprobs
from memory.machine import peak_mib
from rollout import rollout
from tiny.loading import load_model
from train import policy_loss

ROOT, TRL = Path(__file__).parent.parent.parent, "trl==1.16.0"


def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def compare(config: Config, repeats: int, folder: Path) -> None:
    """Play one iteration, write its ids down, time both updates on them, print a line each."""
    model, tokenizer = load_model(config.model, env=config.env, dtype=config.dtype)
    save_policy(model, tokenizer, folder / "policy")  # plain from_pretrained loads it, whatever it came from
    model.to(device())
    torch.manual_seed(config.seed)
    encoder = Encoder(tokenizer, config.context)
    sampler = Sampler(model, tokenizer, max_new_tokens=config.max_new_tokens, temperature=config.temperature)
    games = games_of(config, "train")[: config.tasks]
    trajectories, _ = rollout(
        sampler, encoder, environment(config), games, config.rollouts, context_limit=config.context_limit
    )
    steps = [step for trajectory in trajectories for step in trajectory.steps]
    work = {
        "model": str(folder / "policy"),
        "prompts": [step.context for step in steps],
        "completions": [step.response for step in steps],
        "token_budget": config.token_budget,
        "learning_rate": config.learning_rate,
        "repeats": repeats,
    }
    (folder / "work.json").write_text(json.dumps(work))
    tokens = sum(map(len, work["completions"]))
    print(f"\nupdate alone: {len(steps)} steps, {tokens} completion tokens, medians of {repeats}")
    for name, python in (("ours", sys.executable), ("trl", trl_python())):
        command = [python, str(Path(__file__)), name, str(folder / "work.json")]
        done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
        if done.returncode:
            hint = "out of memory, most likely: try a smaller --token-budget" if done.returncode == -9 else "see above"
            print(f"{name:<6}failed with status {done.returncode} ({hint})", flush=True)
            continue
        seconds, peak = json.loads(done.stdout.splitlines()[-1])
        print(f"{name:<6}{seconds:>9.3f} s{peak:>10.0f} MiB at most", flush=True)


def trl_python() -> str:
    """The interpreter of .trl-venv, made on first use. Raises CalledProcessError where pip fails."""
    folder = Path(__file__).parent / ".trl-venv"
    python = folder / "bin/python"
    if not (folder / "ready").exists():
        venv.create(folder, with_pip=True, clear=True)
        where = [python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"]
        site = subprocess.run(where, capture_output=True, text=True, check=True).stdout.strip()
        Path(site, "outer.pth").write_text(sysconfig.get_path("purelib") + "\n")
        subprocess.run([python, "-m", "pip", "install", "-q", "--no-deps", TRL], check=True)
        (folder / "ready").touch()
    return str(python)


def timed(loss_parts, model, learning_rate: float, repeats: int) -> float:
    """Median seconds of an optimizer step, after one that is not counted. `loss_parts()`: a micro-batch's loss at a
    time."""
    optimizer, times = torch.optim.AdamW(model.parameters(), lr=learning_rate), []
    for _ in range(repeats + 1):
        started = time.perf_counter()
        for loss in loss_parts():
            loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        times.append(time.perf_counter() - started)
    return statistics.median(times[1:])


def ours(work: dict) -> float:
    """Packed sequences through the functions that train.py uses. -> seconds"""
    model = AutoModelForCausalLM.from_pretrained(work["model"]).to(device()).train()
    prompts, completions, budget = work["prompts"], work["completions"], work["token_budget"]
    old = response_logprobs(model, prompts, completions, token_budget=budget)  # (B, R)
    tokens, sequences = sum(map(len, completions)), pack(prompts, completions)

    def parts():
        for micro in micro_batches(sequences, budget):
            new, at = sequence_logprobs(model, micro, 1.0)  # (n,)
            losses, _ = policy_loss(new, old[at].to(new.device), torch.ones_like(new), 0.2)  # (n,)
            yield losses.sum() / tokens

    return timed(parts, model, work["learning_rate"], work["repeats"])


def trl(work: dict) -> float:
    """GRPOTrainer's own loss on padded rows, in micro-batches of as many rows as the token budget holds. -> seconds"""
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer

    tokenizer = AutoTokenizer.from_pretrained(work["model"])
    options = GRPOConfig(
        output_dir=str(Path(work["model"]).parent / "trl-out"),
        report_to="none",
        beta=0.0,
        learning_rate=work["learning_rate"],
        per_device_train_batch_size=2,
        num_generations=2,
        bf16=False,  # as on our side
        gradient_checkpointing=False,
    )
    trainer = GRPOTrainer(
        model=AutoModelForCausalLM.from_pretrained(work["model"]),
        reward_funcs=lambda completions, **_: [0.0] * len(completions),
        args=options,
        train_dataset=Dataset.from_dict({"prompt": ["a", "b"]}),
        processing_class=tokenizer,
    )
    model = trainer.model.train()
    trainer.current_gradient_accumulation_steps = 1  # its training loop sets it
    batches = padded(work, tokenizer.pad_token_id)
    batches = [{k: v.to(trainer.accelerator.device) for k, v in batch.items()} for batch in batches]
    parts = lambda: (trainer.compute_loss(model, batch) for batch in batches)
    return timed(parts, model, work["learning_rate"], work["repeats"])


def padded(work: dict, pad: int) -> list[dict]:
    """Micro-batches in GRPOTrainer's form: prompts padded on the left (S, P), completions on the right (S, C)."""
    rows = sorted(zip(work["prompts"], work["completions"], strict=True), key=lambda row: -len(row[0]) - len(row[1]))
    whole = torch.tensor(float(sum(map(len, work["completions"]))))
    batches = []
    while rows:
        longest = max(len(row[0]) for row in rows) + max(len(row[1]) for row in rows)
        size = max(1, work["token_budget"] // longest)
        part, rows = rows[:size], rows[size:]
        p, c = max(len(prompt) for prompt, _ in part), max(len(completion) for _, completion in part)
        batches.append(
            {
                "prompt_ids": torch.tensor([[pad] * (p - len(prompt)) + prompt for prompt, _ in part]),
                "prompt_mask": torch.tensor([[0] * (p - len(prompt)) + [1] * len(prompt) for prompt, _ in part]),
                "completion_ids": torch.tensor([done + [pad] * (c - len(done)) for _, done in part]),
                "completion_mask": torch.tensor([[1] * len(done) + [0] * (c - len(done)) for _, done in part]),
                "advantages": torch.ones(len(part)),
                "num_items_in_batch": whole,
            }
        )
    return batches


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("side", choices=("ours", "trl"))
    parser.add_argument("work", type=Path, help="work.json, as `compare` writes it")
    args = parser.parse_args()
    work = json.loads(args.work.read_text())
    seconds = ours(work) if args.side == "ours" else trl(work)
    print(json.dumps([seconds, peak_mib(device())]))


if __name__ == "__main__":
    main()
