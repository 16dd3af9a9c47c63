"""Three ways to score the same tokens: python lab/benchmarks/score.py [--model smollm2] [--turns 5 10] [--skills 0 2 5]

Plays one episode, takes its first T turns, puts K step skills evenly over them, and scores the responses with and
without those skills:

    per step   every context a forward pass of its own
    packed     the conversation in one pass, every skill-augmented context in its own
    tree       the conversation and the augmented turns as its branches, in one pass

Prints the median time of each, tokens read, how much faster than per step, and the largest difference of a log-prob.
Runs on the GPU where there is one. `--model random`: a tiny random model, to try the benchmark itself.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent.parent))

import torch

from data import Skills, Trajectory
from envs.alfworld import AlfworldEnv, cached_games
from lm.encoder import Encoder
from lm.precision import device_of
from lm.sampler import Sampler
from lm.scoring import graft, pack, response_logprobs, tree_logprobs
from rescore import skill_contexts
from rollout import rollout
from router import route
from tiny.loading import load_model

LIMIT = 8192  # tokens: of a context in the episode, and of a forward pass
SKILL = "look in every closed place once, take the thing as soon as it is seen, and go straight to where it belongs"


def load(name: str):
    """(model, tokenizer, prompt style) on the device that there is."""
    if name == "random":
        from tiny.warmstart import tiny_model, tiny_tokenizer

        tokenizer = tiny_tokenizer()
        model = tiny_model(len(tokenizer), seed=0)
    else:
        model, tokenizer = load_model(name)
    model.to(device_of()).eval()
    return model, tokenizer, "compact" if name in ("random", "tiny") else "official"


def play(model, encoder: Encoder, prompt: str, turns: int) -> Trajectory:
    """One episode of (at most) that many turns."""
    torch.manual_seed(0)
    make_env = lambda: AlfworldEnv(max_steps=turns, prompt=prompt)
    game = cached_games("small", "valid_seen", 1)
    sampler = Sampler(model, encoder.tokenizer, max_new_tokens=24, temperature=1.0)
    return rollout(sampler, encoder, make_env, game, 1, context_limit=LIMIT)[0][0]


def rows(encoder: Encoder, trajectory: Trajectory, turns: int, skills: int):
    """(contexts, responses, skill-augmented contexts) of the first turns; None where a turn has no skill."""
    part = Trajectory(trajectory.task, 0, trajectory.steps[:turns], False)
    taught = {k * len(part.steps) // skills: SKILL for k in range(skills)}
    routes = [route(part, Skills("", SKILL, taught), "step")]
    guided, _ = skill_contexts(encoder, [part], routes, "step", LIMIT)
    return [step.context for step in part.steps], [step.response for step in part.steps], guided


def ways(model, contexts, responses, guided) -> dict:
    """name -> (what scores both, tokens that it reads)."""
    augmented = [(context, response) for context, response in zip(guided, responses, strict=True) if context]
    more = sum(len(context) + len(response) for context, response in augmented)

    def apart(packed: bool):
        plain = response_logprobs(model, contexts, responses, token_budget=LIMIT, packed=packed)
        return plain, response_logprobs(model, guided, responses, token_budget=LIMIT, packed=packed)

    def tree():
        return tree_logprobs(model, contexts, responses, guided, token_budget=LIMIT)

    read = lambda sequences: sum(len(sequence.ids) for sequence in sequences)
    together = pack(contexts, responses)
    return {
        "per step": (lambda: apart(False), read(pack(contexts, responses, packed=False)) + more),
        "packed": (lambda: apart(True), read(together) + more),
        "tree": (tree, read(graft(together, guided, responses, LIMIT))),
    }


def timed(score, repeats: int):
    """(median seconds, what it returned)."""
    times = []
    for _ in range(repeats):
        started = time.perf_counter()
        scores = score()  # on the CPU by the time it returns
        times.append(time.perf_counter() - started)
    return statistics.median(times), scores


def difference(a, b) -> float:
    return max((x - y).abs().nan_to_num().max().item() for x, y in zip(a, b, strict=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2", help="as for train.py, or 'random'")
    parser.add_argument("--turns", type=int, nargs="+", default=[5, 10, 20, 40], help="T: turns of the episode")
    parser.add_argument("--skills", type=int, nargs="+", default=[0, 2, 5], help="K: step skills")
    parser.add_argument("--repeats", type=int, default=3, help="timings of which the median is taken")
    parser.add_argument("--per-step-turns", type=int, default=20, help="leave 'per step' out above that many turns")
    args = parser.parse_args()
    model, tokenizer, prompt = load(args.model)
    encoder = Encoder(tokenizer, "chat")
    trajectory = play(model, encoder, prompt, max(args.turns))
    print(f"{args.model} on {model.device.type}, {torch.get_num_threads()} CPU threads, {LIMIT} tokens a pass at most")
    print(
        f"{'T':>3} {'K':>2}  {'way':<9}{'seconds':>9}{'tokens':>9}{'x per step':>12}{'x packed':>10}{'difference':>12}"
    )
    for score, _ in ways(model, *rows(encoder, trajectory, 1, 0)).values():
        score()  # not counted: the first call sets things up
    for turns in args.turns:
        for skills in args.skills:
            seconds, scores = {}, {}
            for name, (score, tokens) in ways(model, *rows(encoder, trajectory, turns, skills)).items():
                if name == "per step" and turns > args.per_step_turns:
                    continue
                seconds[name], scores[name] = timed(score, args.repeats)
                ratios = [
                    f"{seconds[other] / seconds[name]:.1f}" if other in seconds else "-"
                    for other in ("per step", "packed")
                ]
                print(f"{min(turns, len(trajectory.steps)):>3} {skills:>2}  {name:<9}{seconds[name]:>9.3f}", end="")
                print(f"{tokens:>9}{ratios[0]:>12}{ratios[1]:>10}", end="")
                print(f"{difference(scores[name], next(iter(scores.values()))):>12.1e}", flush=True)


if __name__ == "__main__":
    main()
