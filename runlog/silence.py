"""A loud word where a run learns nothing, or falls: which part failed, since when, and the flag that helps."""

from __future__ import annotations

from dataclasses import replace

from config import LOCAL_WRITERS, Config, flag
from data import Batch
from evaluate import MOST, acted, misfits

EVERY = 5  # iterations between two looks, after the first
PARTIAL = {"steps", "fall"}  # what leaves something to be learnt: --strict goes on
WINDOW = 5  # iterations that a sign of a fall is averaged over: in the smallest stored runs 40 episodes
# A sign has fallen where its mean is below this share of the run's best. Both have where a policy does not end its
# episodes any more; skills are often readable yet, so that they are only told of. Half as a share warns of bad luck.
FELL = {"success": 1 / 4, "unused": 1 / 4}


def shares(batch: Batch, ends: set[int], unknown: int | None) -> dict[str, float]:
    """Metrics that only this is for. `ends`, `unknown`: see `acted`."""
    guided = (~batch.advantages.skill.isnan()).sum().item()
    return acted(batch.steps, ends, unknown) | {"guided/tokens": guided / max(1, batch.mask.sum().item())}


def silences(config: Config, metrics: dict[str, float]) -> dict[str, str]:
    """What is wrong with an iteration -> in words, with what helps. Empty where it may have taught something."""
    found = misfits(config, metrics)
    if "actions" in found:
        found["actions"] += ". samples.jsonl shows what it answered"
    full = metrics.get("rollout/context_full", 0) + metrics.get("rollout/too_long", 0)
    if full > MOST * (episodes := metrics["episodes"] + metrics.get("rollout/too_long", 0)):
        found["full"] = (
            f"{full:.0f} of {episodes:.0f} episodes end because their context is full, at --context-limit "
            f"{config.context_limit}: raise it, or take --context window or a lower --max-steps"
        )
    if config.levels and not metrics["guided/tokens"]:
        cost = ", so this is GRPO at OPID's cost" if config.writes_skills else ""
        found["skills"] = f"no step is guided by a skill{cost}: {_unguided(config, metrics)}"
    elif config.levels and not metrics["advantage/skill_abs"]:
        found["shift"] = "skills guide steps and change no log-prob: all of them say the same, or nothing"
    elif set(config.levels) == {"episode", "step"} and metrics.get("guided/step") == 0 and config.routing != "episode":
        dropped = metrics.get("skills/step_keys_dropped", 0)
        found["steps"] = f"no step has a skill of its own ({dropped:.0f} name no step), so --step-weight does nothing"
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
    if not config.writes_skills:
        return f"--algo {config.algo} found none. More --rollouts, easier tasks, or a cold start"
    if metrics.get("skills/parse_rate", 1.0):
        return f"the skills name no step that --routing {config.routing} and the weights let guide"
    if config.skill_writer not in LOCAL_WRITERS:
        refused = metrics.get("skills/too_long", 0)
        return (
            f"--skill-writer {config.skill_writer} gave no answer that could be read as skills ({refused:.0f} refusals)"
        )
    if metrics.get("skills/too_long") and metrics["skills/too_long"] >= metrics["episodes"]:
        if config.skills_may_fail:
            return "the writer failed, or refused every transcript: the log says why"
        return "no transcript fits: raise --skill-context-limit (or --context-limit)"
    return (
        "no answer could be read as skills. Cut off? Raise --skill-tokens. No JSON? --skill-prefill "
        '\'{"episode_summary": "\' starts it, or let another --skill-writer write'
    )


def signs(config: Config, metrics: dict[str, float]) -> dict[str, float]:
    """What falls together in a run that falls, as shares: success, the steps that an episode leaves unused, and mostly
    readable skills. Empty where no skills are written: nothing stored of those falls."""
    if "skills/parse_rate" not in metrics:
        return {}
    unused = 1 - metrics["rollout/steps"] / config.max_steps
    return {"readable": metrics["skills/parse_rate"], "success": metrics["train/success"], "unused": unused}


def followed(before: dict[str, dict], now: dict[str, float]) -> dict[str, dict]:
    """Each sign's last WINDOW values, and its best mean of so many, with those `now`. `before`: the same, an iteration
    ago; both are plain values, to be kept with the run."""
    kept = {}
    for name, value in now.items():
        recent = [*before.get(name, {}).get("recent", []), value][-WINDOW:]
        best = before.get(name, {}).get("best", 0.0)
        kept[name] = {"recent": recent, "best": max(best, _mean(recent)) if len(recent) == WINDOW else best}
    return kept


def fall(config: Config, kept: dict[str, dict]) -> dict[str, str]:
    """Where all signs of FELL have fallen: in words, with what helps. The kind is "fall", from which a run may come
    back; it is "fallen" where no episode succeeds any more. `kept`: see `followed`."""
    if not kept or any(_mean(kept[name]["recent"]) >= share * kept[name]["best"] for name, share in FELL.items()):
        return {}
    told = {name: (sign["best"], _mean(sign["recent"])) for name, sign in kept.items()}
    readable, success = ("{:.0%} to {:.0%}".format(*told[name]) for name in ("readable", "success"))
    best, now = (config.max_steps * (1 - unused) for unused in told["unused"])
    words = (
        f"the run falls. Means of {WINDOW} iterations, best and last: readable skills {readable}, steps of an episode "
        f"{best:.1f} to {now:.1f} of {config.max_steps}, success {success}. In another --out take "
        f"{_against_a_fall(config)}"
    )
    return {"fall" if any(kept["success"]["recent"]) else "fallen": words}


def _mean(sign: list[float]) -> float:
    return sum(sign) / len(sign)


def _against_a_fall(config: Config) -> str:
    """What this --algo allows, and is not so already."""
    weights = [name for name in ("episode_weight", "step_weight") if config.levels and getattr(config, name) > 0]
    helps = [f"a smaller {' and '.join(flag(name) for name in weights)}"] if weights else []
    if config.levels and config.scorer == "old":
        helps.append("--scorer reference")
    more = 2 * config.kl or 0.01
    if replace(config, kl=more).kl == more:  # else its loss has no KL term
        helps.append(f"a larger --kl than {config.kl:g}")
    return " or ".join(helps or ["a lower --learning-rate"])
