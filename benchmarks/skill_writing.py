"""Three ways to have the policy write skills: python benchmarks/skill_writing.py [--model smollm2] [--turns 20]

    prompt        a new prompt with the transcript in it (--skill-transcript prompt, the default)
    conversation  a request at the end of the finished conversation, which is read anew
    cached        the same, going on from the KV cache of the rollout (--skill-transcript conversation)

Prints the median time, tokens read before the first new one (padding included), forward passes, and how much faster
than `prompt`. Answers are cut at --new-tokens, so with a model that seldom ends by itself all write as many. What
keeping the finished rows costs the rollout is in the first line. Runs on the GPU where there is one.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from contextlib import contextmanager
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch

from benchmarks.score import load
from envs.alfworld import AlfworldEnv, cached_games
from lm.encoder import Encoder
from lm.sampler import Sampler
from lm.writers import conversation_writer, model_writer
from rollout import rollout
from skills import analysis_prompt

STEP_SKILLS = 5


@contextmanager
def counting(model):
    """Notes the shape (rows, new tokens) of every forward pass."""
    shapes: list[tuple[int, int]] = []
    hook = lambda _, args, inputs: shapes.append(tuple(inputs["input_ids"].shape))
    handle = model.register_forward_pre_hook(hook, with_kwargs=True)
    yield shapes
    handle.remove()


def play(model, encoder: Encoder, prompt: str, turns: int, episodes: int, keep: bool):
    """(trajectories, the sampler that played them, seconds)"""
    torch.manual_seed(0)
    sampling = {"max_new_tokens": 24, "temperature": 1.0}
    sampler = Sampler(model, encoder.tokenizer, **sampling, keep_finished=keep)
    lengths = iter([max(1, turns - turns * i // (2 * episodes)) for i in range(episodes)])  # some end earlier
    make_env = lambda: AlfworldEnv(max_steps=next(lengths), prompt=prompt)
    games = cached_games("small", "valid_seen", episodes)
    started = time.perf_counter()
    trajectories, _ = rollout(sampler, encoder, make_env, games, 1, context_limit=10**6)
    return trajectories, sampler, time.perf_counter() - started


def ways(model, encoder: Encoder, trajectories, sampler: Sampler, template: str | None, new_tokens: int) -> dict:
    """name -> what writes one answer for each trajectory."""
    answering = {"max_new_tokens": new_tokens, "temperature": 1.0, "context_limit": 10**6, "batch_tokens": 10**9}
    prompts = [analysis_prompt(t, STEP_SKILLS, template) for t in trajectories]
    requests = [analysis_prompt(t, STEP_SKILLS, template, conversation=True) for t in trajectories]
    by_prompt = model_writer(model, encoder.tokenizer, **answering)
    anew = conversation_writer(model, encoder, trajectories, **answering)
    cached = conversation_writer(model, encoder, trajectories, recall=sampler.recall, **answering)
    return {
        "prompt": lambda: by_prompt(prompts),
        "conversation": lambda: anew(list(enumerate(requests))),
        "cached": lambda: cached(list(enumerate(requests))),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2", help="as for train.py, or 'random'")
    parser.add_argument("--turns", type=int, nargs="+", default=[5, 10, 20], help="T: most turns an episode")
    parser.add_argument("--episodes", type=int, default=4)
    parser.add_argument("--new-tokens", type=int, default=96, help="most tokens of an answer")
    parser.add_argument("--repeats", type=int, default=3, help="timings of which the median is taken")
    args = parser.parse_args()
    model, tokenizer, prompt = load(args.model)
    encoder, template = Encoder(tokenizer, "chat"), AlfworldEnv(prompt=prompt).analysis_prompt()
    print(f"{args.model} on {model.device.type}, {torch.get_num_threads()} CPU threads, {args.episodes} episodes")
    for turns in args.turns:
        plain = statistics.median(play(model, encoder, prompt, turns, args.episodes, False)[2] for _ in range(2))
        trajectories, sampler, seconds = play(model, encoder, prompt, turns, args.episodes, True)
        print(f"T {turns}: played in {plain:.3f} s, in {seconds:.3f} s with finished rows kept")
        median: dict[str, float] = {}
        for name, write in ways(model, encoder, trajectories, sampler, template, args.new_tokens).items():
            times = []
            for _ in range(args.repeats):
                torch.manual_seed(0)
                with counting(model) as shapes:
                    started = time.perf_counter()
                    write()
                    times.append(time.perf_counter() - started)
            median[name] = statistics.median(times)
            print(f"    {name:<13}{median[name]:>9.3f} s{shapes[0][0] * shapes[0][1]:>9} tokens read", end="")
            print(f"{len(shapes):>6} passes{median['prompt'] / median[name]:>7.2f} x prompt", flush=True)


if __name__ == "__main__":
    main()
