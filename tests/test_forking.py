"""Each diff of docs/forking.md, applied to a copy of the code, trains one iteration by the command under it."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PARTS = re.findall(
    r"^## (.*?)\n.*?```diff\n(.*?)```\n.*?```bash\n(.*?)```", (ROOT / "docs/forking.md").read_text(), re.S | re.M
)
DIFFS = {title: (diff, command) for title, diff, command in PARTS}
SMALL = "--iterations 1 --tasks 2 --rollouts 2 --max-steps 3 --max-new-tokens 24 --train-games 6 --eval-games 1 "
SMALL += "--mini-batch 4 --invalid-penalty 1 --scorer old --sample-every 1 --eval-every 0 --skill-tokens 96 "
SMALL += "--context-limit 2048 --skill-context-limit none --token-budget 4096 --mixed-precision no"

# A small random model in place of the command's; since it solves nothing and writes no skills, its episodes are won by
# turns, and a script writes.
SCRIPT = """
import sys, torch, rollout, runlog.start, train
from config import parse_args, variant_of
from envs.alfworld import AlfworldEnv
from tiny.warmstart import tiny_model, tiny_tokenizer

def played(*args, **kwargs):
    trajectories, metrics = plain_rollout(*args, **kwargs)
    for i, trajectory in enumerate(trajectories):
        trajectory.success = i % 2 == 0
    return trajectories, metrics

torch.set_num_threads(1)
AlfworldEnv.parse_action = lambda self, text, admissible: (text, len(text) % 2 == 0)
tokenizer, plain_rollout = tiny_tokenizer(), rollout.rollout
rollout.rollout = played
skill = '{"episode_summary": "s", "episode_skill": "open every closed place", "step_skills": {"1": "look in bed"}}'
runlog.start.load_model = lambda *a, **k: (tiny_model(len(tokenizer), seed=0, width=48), tokenizer)
runlog.start.model_writer = lambda *a, **k: lambda prompts: [skill] * len(prompts)
config = parse_args(sys.argv[1:])
train.train(runlog.start.start(config), variant_of(config.algo))
"""


@pytest.fixture
def tree(tmp_path):
    """What a run needs of the code, to be changed at will."""
    copy = tmp_path / "copy"
    for part in ("variants", "envs", "lm", "memory", "runlog", "tiny", "recipes"):
        shutil.copytree(ROOT / part, copy / part, ignore=shutil.ignore_patterns("__pycache__"))
    for file in ROOT.glob("*.py"):
        shutil.copy(file, copy)
    return copy


def run(tree: Path, title: str) -> tuple[dict, list[dict]]:
    """Applies a diff and runs its command -> the metrics of its iteration, and its trajectories."""
    diff, command = DIFFS[title]
    # or git would look for a repository above
    surroundings = os.environ | {"GIT_CEILING_DIRECTORIES": str(tree.parent)}
    subprocess.run(["git", "apply", "-"], cwd=tree, input=diff, env=surroundings, text=True, check=True)
    python, script, *flags = shlex.split(command.replace("\\\n", " "))
    assert (python, script) == ("python", "train.py")
    flags += [*SMALL.split(), "--out", "out"]
    done = in_tree(tree, SCRIPT, *flags)
    [metrics] = [json.loads(line) for line in (tree / "out/metrics.jsonl").read_text().splitlines()]
    assert (tree / "out/policy").is_dir() and metrics["grad_norm"] > 0, done
    return metrics, [json.loads(line) for line in (tree / "out/samples.jsonl").read_text().splitlines()]


def in_tree(tree: Path, script: str, *flags: str) -> str:
    done = subprocess.run([sys.executable, "-c", script, *flags], cwd=tree, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_every_part_has_a_diff_and_a_command():
    assert list(DIFFS) == [
        "A loss term: an entropy bonus",
        "A method",
        "A routing rule",
        "The step skill in another place",
        "An environment",
        "A skill writer",
    ]


def test_a_loss_term(tree):
    """Its flag is known, and the mean of -log pi(y) is logged: beside what it was when the tokens were sampled."""
    metrics, samples = run(tree, "A loss term: an entropy bonus")
    logprobs = [logprob for sample in samples for step in sample["steps"] for logprob in step["old_logprobs"]]
    assert metrics["loss/entropy"] == pytest.approx(-sum(logprobs) / len(logprobs), rel=0.05)


def test_a_method(tree):
    """Two rollouts: each is compared with the other. 10 for the won one and 0 for the lost one, no skill."""
    _, samples = run(tree, "A method")
    for sample in samples:
        assert {a for step in sample["steps"] for a in step["advantages"]} == {10.0 if sample["success"] else -10.0}
        assert sample["skills"] is None


def test_a_routing_rule(tree):
    """A random model is sure of nothing."""
    metrics, samples = run(tree, "A routing rule")
    assert {sample["success"] for sample in samples} == {True, False}
    for sample in samples:
        levels = [[guidance["level"] for guidance in step["route"]] for step in sample["steps"]]
        assert levels == ([[], ["step"], []] if sample["success"] else [["episode"], ["step"], ["episode"]])
    assert (metrics["guided/step"], metrics["guided/episode"]) == pytest.approx((1 / 3, 1 / 3))


def test_the_step_skill_in_another_place(tree):
    """Before the list of actions, in the first prompt and in later ones; the plain prompt stays as it is."""
    metrics, _ = run(tree, "The step skill in another place")
    assert metrics["guided/step"] == pytest.approx(1 / 3)
    script = "from envs.alfworld import AlfworldEnv; from router import fill; from data import Guidance\n"
    script += "for past in ([], [('seen', 'done')]):\n"
    script += "    prompt = AlfworldEnv().build_prompt('window', 'task', past, 'see', ['go'])\n"
    script += "    print(fill(prompt, Guidance('step', 'LOOK')).replace(chr(10), ' '))\n"
    script += "    print(fill(prompt).replace(chr(10), ' '))\n"
    first, first_plain, later, later_plain = in_tree(tree, script).splitlines()
    for guided in (first, later):
        assert guided.index("see") < guided.index("LOOK") < guided.index("admissible actions")
    assert "admissible actions" in first_plain and "LOOK" not in first_plain + later_plain


def test_an_environment(tree):
    _, samples = run(tree, "An environment")
    assert {sample["task"] for sample in samples} == {"find my number from 1 to 64"}  # with its own option
    assert "Advice: " not in samples[0]["steps"][0]["prompt"]
    assert samples[0]["steps"][0]["route"] == [{"level": "episode", "text": "open every closed place"}]


def test_a_skill_writer(tree):
    metrics, samples = run(tree, "A skill writer")
    assert metrics["skills/parse_rate"] == 1
    for sample in samples:
        assert ("Do not repeat" in sample["skills"]["episode"]) is not sample["success"]
