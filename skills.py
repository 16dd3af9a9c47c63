"""Hindsight skills: ask a model what a finished trajectory teaches, and read its answer.

    Trajectory -> analysis_prompt -> write (prompts -> answers) -> parse_skills -> Skills | None

Who writes: lm/writers.py. How an answer is read: lm/answers.py. Paper: "skill extraction"; authors' release:
opid/analysis.py (OPIDEpisodeAnalyzer), which asks an external LLM.
"""

from __future__ import annotations

from contextlib import suppress
from typing import TYPE_CHECKING

from data import Skills, Trajectory
from lm.answers import parse_skills
from lm.writers import Writer

if TYPE_CHECKING:
    from runlog.start import Run

# Why the rules at its end: the re-scored policy sees a skill, but the trained one never does. A skill that states what
# only hindsight knows (where the object lay in this very game) teaches it to act on facts that it cannot see, and at
# larger skill weights training collapses to zero, however correct such skills are. General skills can be learned.
GENERAL_TEMPLATE = """\
Below is one finished episode of an agent. Write down what it teaches for other attempts at tasks of this kind.

Task: {task}
Outcome: {outcome}
Steps, numbered from 0, each as observation -> action:
{steps}

Write three things:
1. episode_summary: one or two sentences on what happened.
2. episode_skill: {focus}
3. step_skills: for at most {max_step_skills} critical steps, one short imperative sentence each: what to do there.

Rules for skills:
- Be general: the order of work, what to check, what to avoid, where such things are usually found.
- Never state what only hindsight knows, such as where the object turned out to be: the reader cannot see that.
- A step skill may use only what could be known at that step: the task and the observations up to it.

Answer with one JSON object and nothing else, its step_skills keyed by step number:
{{"episode_summary": "...", "episode_skill": "...", "step_skills": {{"<step>": "..."}}}}"""

_SUCCESS_FOCUS = "the workflow that made it succeed: in which order to work, and what to check before moving on."
_FAILURE_FOCUS = "what to avoid: the mistake that made it fail, its warning signs, and what to do when they appear."


def analysis_prompt(trajectory: Trajectory, max_step_skills: int, template: str | None = None) -> str:
    """The prompt that asks for one trajectory's skills (authors': _build_episode_analysis_prompt).

    `template` is a str.format string with any of the fields {task} {outcome} {steps} {max_step_skills} and {focus}
    (what to write for this outcome: a workflow or what to avoid); None takes the general one. Raises ValueError for
    a template with other fields. Values are not formatted again, so braces in an observation stay as they are.
    """
    lines = [" ".join(f"step {t}: {s.observation} -> {s.action}".split()) for t, s in enumerate(trajectory.steps)]
    fields = {
        "task": trajectory.task,
        "outcome": "success" if trajectory.success else "failure",
        "steps": "\n".join(lines),
        "max_step_skills": min(max_step_skills, len(lines)),
        "focus": _SUCCESS_FOCUS if trajectory.success else _FAILURE_FOCUS,
    }
    try:
        return (template or GENERAL_TEMPLATE).format(**fields)
    except (LookupError, AttributeError, TypeError, ValueError) as error:
        raise ValueError(f"bad analysis template: {error!r}; fields: {', '.join(fields)}; double the rest") from error


def own_skills(run: Run, trajectories: list[Trajectory]) -> tuple[list[Skills | None], dict[str, float]]:
    """Each trajectory's own skills, written by `--skill-writer`, and metrics."""
    template = run.make_env().analysis_prompt()
    with run.reading(run.models.get(run.config.skill_writer)):
        return write_skills(trajectories, run.writer, max_step_skills=run.config.max_step_skills, template=template)


def write_skills(
    trajectories: list[Trajectory], write: Writer, *, max_step_skills: int, template: str | None = None
) -> tuple[list[Skills | None], dict[str, float]]:
    """Skills of each trajectory, None where there are none, and metrics. Answers that do not parse get one retry.

    skills/parse_rate, skills/first_parse_rate   share of all trajectories that have skills, after and before the retry
    skills/retried, skills/failed                answers asked for again, and trajectories given up after that
    skills/too_long                              prompts that the writer could not read or refused (not retried)
    skills/step_skills                           step skills per trajectory that has skills
    skills/step_keys_dropped                     step skills that name no step of their episode or are no text, in all

    Raises what `write` raises: a writer that is down must not look like a policy that has nothing to say.
    """
    prompts = [analysis_prompt(trajectory, max_step_skills, template) for trajectory in trajectories]
    answers = write(prompts) if prompts else []
    skills: list[Skills | None] = [None] * len(trajectories)
    retries: dict[int, str] = {}  # trajectory -> its second prompt
    for i, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
        if answer is None:
            continue
        try:
            skills[i] = parse_skills(answer, len(trajectories[i].steps), max_step_skills)
        except ValueError as error:
            retries[i] = retry_prompt(prompt, answer, error)
    second = write(list(retries.values())) if retries else []
    for i, answer in zip(retries, second, strict=True):
        with suppress(ValueError):
            skills[i] = parse_skills(answer or "", len(trajectories[i].steps), max_step_skills)  # None: no room for it
    parsed = [own for own in skills if own is not None]
    total, too_long = max(1, len(prompts)), sum(answer is None for answer in answers)
    return skills, {
        "skills/parse_rate": len(parsed) / total,
        "skills/first_parse_rate": (len(prompts) - too_long - len(retries)) / total,
        "skills/retried": len(retries),
        "skills/failed": len(prompts) - too_long - len(parsed),
        "skills/too_long": too_long,
        "skills/step_skills": sum(len(own.steps) for own in parsed) / max(1, len(parsed)),
        "skills/step_keys_dropped": sum(own.dropped for own in parsed),
    }


def retry_prompt(prompt: str, answer: str, error: ValueError) -> str:
    shown = answer if len(answer) <= 1000 else answer[:1000] + " [...]"  # the prompt must still fit
    return f"{prompt}\n\nEarlier answer:\n{shown}\n\nIt cannot be used: {error}. Answer again, with correct JSON only."
