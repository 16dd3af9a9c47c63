"""A loud word where a run learns nothing: which part failed, since when, and the flag that helps."""

from __future__ import annotations

from config import Config
from data import Batch

EVERY = 5  # iterations between two looks, after the first
MOST = 0.5  # the share above which responses that are cut off, or unknown tokens, are no accident


def shares(batch: Batch, ends: set[int], unknown: int | None) -> dict[str, float]:
    """Metrics that only this is for. `ends`: tokens that end a turn; `unknown`: the tokenizer's token for what it does
    not know, None where it has none."""
    steps, tokens = batch.steps, sum(len(step.context) for step in batch.steps)
    strange = sum(step.context.count(unknown) for step in steps) if unknown is not None else 0
    guided = (~batch.advantages.skill.isnan()).sum().item()
    return {
        "rollout/cut_off": sum(step.response[-1] not in ends for step in steps) / max(1, len(steps)),
        "rollout/unknown_tokens": strange / max(1, tokens),
        "guided/tokens": guided / max(1, batch.mask.sum().item()),
    }


def silences(config: Config, metrics: dict[str, float]) -> dict[str, str]:
    """What is wrong with an iteration -> in words, with what helps. Empty where it may have taught something."""
    found = {}
    if metrics["rollout/cut_off"] > MOST:
        found["cut off"] = (
            f"{metrics['rollout/cut_off']:.0%} of the responses are cut off at --max-new-tokens "
            f"{config.max_new_tokens}: raise it, or take a --prompt that asks for less"
        )
    if metrics["rollout/unknown_tokens"] > MOST:
        found["unknown"] = (
            f"{metrics['rollout/unknown_tokens']:.0%} of the prompts' tokens are unknown to --model {config.model}: "
            "--prompt compact, --env and its data must be those that it was trained on"
        )
    if not metrics["rollout/valid_actions"]:
        found["actions"] = (
            f"no action was valid: does --prompt {config.prompt} fit --model {config.model}? A model that knows "
            "neither format nor game needs a cold start (tools/coldstart.py). samples.jsonl shows what it answered"
        )
    if config.levels and not metrics["guided/tokens"]:
        found["skills"] = f"no step is guided by a skill, so this is GRPO at OPID's cost: {_unguided(config, metrics)}"
    elif config.levels and not metrics["advantage/skill_abs"]:
        found["shift"] = "skills guide steps and change no log-prob: all of them say the same, or nothing"
    if config.rollouts == 1 and not metrics["advantage/outcome_abs"]:
        found["outcome"] = "groups of one have nobody to be compared with, so A_ep is 0: more --rollouts"
    if not metrics["advantage/outcome_abs"] and not metrics["advantage/skill_abs"]:
        found["advantages"] = (
            "every advantage is 0: all episodes of a task ended alike. More --rollouts, easier tasks, or a cold start"
        )
    return found


def _unguided(config: Config, metrics: dict[str, float]) -> str:
    """Why no skill came through."""
    if metrics.get("guided/episode_too_long", 0) + metrics.get("guided/step_too_long", 0):
        return f"contexts with a skill do not fit into --context-limit {config.context_limit}: raise it"
    if metrics.get("skills/parse_rate", 1.0):
        return f"the skills name no step that --routing {config.routing} and the weights let guide"
    if metrics.get("skills/too_long") and metrics["skills/too_long"] >= metrics["episodes"]:
        if config.skills_may_fail:
            return "the writer failed, or refused every transcript: the log says why"
        return "no transcript fits: raise --skill-context-limit (or --context-limit)"
    return (
        "no answer could be read as skills. Cut off? Raise --skill-tokens. No JSON? --skill-prefill "
        '\'{"episode_summary": "\' starts it, or let another --skill-writer write'
    )
