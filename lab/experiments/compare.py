"""Methods against one another: python lab/experiments/compare.py --methods grpo opid sdar --seeds 10

With a pretrained model: --model cold:smollm2 --recipe laptop-smollm2 (what is not named here goes to every run). From
folders of one's own, one a training: --model runs/plain-search-seed{}.
Without a --recipe every run has the laptop's.

An arm is a method by its defaults (--methods), or a variant named in lab/experiments/arms.toml (--arms opid-k0 ...).

Every run starts from the same weights, warm-started or those of --model; runs of one seed meet the same tasks in the
same iteration, and all play the same number of episodes. --trainings N does this from each of N starting models, which
differ in the seed of their own training: that is what results depend on most. Made on another kind of processor they
are others: add new ones by --first-training. --at-once runs at a time, one thread each. A finished run is one line of
lab/results/NAME.jsonl (config, commit, curve, seconds), and is never made again; its folder, with the final policy and
the last checkpoint, stays under runs/NAME. A comparison that is stopped (Ctrl-C, SIGTERM) stops its runs, too, and goes
on from their checkpoints. Seeds are 0 to N - 1, all of them reported: NAME.md and NAME.png beside NAME.jsonl. --report
makes these again from all seeds that are there, of the named arms, else of those that NAME.md has. What is tuned is
tuned on other seeds (--first-seed 100, in another --results), so that none of those reported was chosen by.
"""

from __future__ import annotations

import argparse
import os
import re
import shlex
import sys
import tomllib
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent.parent))
import lm  # isort: skip

from filelock import FileLock

from config import Config, parse_args, variant_of
from evaluate import eval_splits, games_of
from lab.experiments.children import Children
from lab.experiments.runs import RESULTS, ROOT, arm_of, commit, fingerprint, flags_of, on_the_laptop, settings
from lab.experiments.stored import add, alone, differing, find, read
from lab.experiments.tables import (
    LONGER,
    by_episodes,
    by_run,
    by_type,
    costs,
    draw,
    ends,
    leads,
    read_shares,
    runs_of,
    training_of,
)
from lm.loading import read_json, remove, save_policy, write_whole
from runlog.checkpoints import saved
from runlog.metrics import read_lines
from tiny.coldstart import PREFIX
from tiny.loading import load_model
from tiny.plays import TINY

QUICK = "--iterations 2 --tasks 2 --rollouts 2 --max-steps 3 --max-new-tokens 4 --train-games 4 --eval-games 2"
QUICK += " --mini-batch 8 --eval-every 1 --skill-tokens 8"
# Where the signal comes from: the metrics that a result keeps of every iteration.
SIGNAL = ("advantage/outcome_abs", "advantage/silent_groups", "advantage/skill_abs", "advantage/skill_mean")
SIGNAL += ("skills/parse_rate", "guided/episode", "guided/step", "rollout/valid_actions")
SIGNAL += ("rollout/steps", "rollout/response_tokens", "rollout/entropy")

TIMES = 5  # so many times the iterations has the arm LONGER: about as many tokens as OPID's run
FINAL = "final.txt"  # what evaluate.py printed of a run's policy

# What all arms of one table have in common.
BENCH = ("env", "env_options", "iterations", "max_steps", "eval_every", "eval_games", "eval_temperature", "train_games")


@dataclass(frozen=True)
class Job:
    """One run: an arm and a seed, its settings, which weights it starts from, and the file that its result goes to."""

    name: str
    arm: str
    seed: int
    training: int  # of the starting model
    config: Config
    results: Path
    start: str  # fingerprint


def read_arms() -> dict[str, str]:
    """Arm -> its flags of train.py."""
    return tomllib.loads(Path(__file__).with_name("arms.toml").read_text())


def jobs_of(
    arms: dict[str, str], seeds: Iterable[int], flags: list[str], starts: dict[int, Path], results: Path, runs: Path
) -> list[Job]:
    """Seed by seed, and within it start by start, so that a comparison stopped early holds all arms on the same ones.
    `starts`: training -> its folder. An arm's flags override `flags`, which go to every run."""
    jobs, weights = [], {training: fingerprint(start) for training, start in starts.items()}
    for seed in seeds:
        for training, start in starts.items():
            for arm, own in arms.items():
                name = f"{arm}-seed{seed}" if start.name == "start" else f"{arm}-{start.name}-seed{seed}"
                fixed = ["--seed", str(seed), "--model", str(start), "--prompt", "compact", "--out", str(runs / name)]
                config = parse_args([*on_the_laptop(flags), *shlex.split(own), *fixed, "--resume"], for_several=True)
                if arm == LONGER:
                    config = replace(config, iterations=TIMES * config.iterations, eval_every=TIMES * config.eval_every)
                jobs.append(Job(name, arm, seed, training, config, results, weights[training]))
    return jobs


def is_there(job: Job) -> bool:
    """Whether the run was made before. Raises ValueError where its line holds a run of other settings or weights."""
    result = find(job.results, job.name)
    if result is None:
        return False
    told = f"{job.results} holds a run {job.name}"
    if others := differing(result["config"], settings(job.config)):
        raise ValueError(f"{told} with other settings of {', '.join(others)}: use another --results")
    if result["start"] != job.start:
        raise ValueError(f"{told} from other starting weights: use another --results and --runs")
    return True


def check_folder(job: Job) -> None:
    """Raises ValueError where a run of other settings was begun in the job's folder: train.py might go on with it."""
    begun, own = Path(job.config.out, "config.json"), settings(job.config)
    if begun.is_file():
        found = {name: value for name, value in read_json(begun).items() if name in own}
        if others := differing(found, own):
            told = f"{begun.parent} holds a run with other settings of {', '.join(others)}"
            raise ValueError(f"{told}: use another --runs")


def launch(job: Job, children: Children, final_games: int = 0) -> None:
    """Train in a process of its own, and let the policy play `final_games` of each split in another one. Raises
    RuntimeError with the end of its output where one fails."""
    commands = [["train.py", *flags_of(job.config.to_dict())]]
    Path(job.config.out, FINAL).unlink(missing_ok=True)
    if final_games:
        commands += [["evaluate.py", "--model", f"{job.config.out}/policy", "--eval-games", str(final_games)]]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    for command in commands:
        done = children.run([sys.executable, *command], cwd=ROOT, env=environment)
        if done.returncode:
            raise RuntimeError(f"{job.name} failed:\n{done.stdout[-1000:]}\n{done.stderr[-2000:]}")
    if final_games:
        Path(job.config.out, FINAL).write_text(done.stdout)


def store(job: Job, version: str) -> None:
    """The result of a finished run, which then keeps one checkpoint. Raises RuntimeError for one that is not whole."""
    folder = Path(job.config.out)
    metrics, evaluations = read_lines(folder / "metrics.jsonl"), read_lines(folder / "evaluations.jsonl")
    if len(metrics) != job.config.iterations:
        raise RuntimeError(f"{folder} has {len(metrics)} iterations of {job.config.iterations}")
    points = [e["iteration"] + 1 for e in evaluations]
    result = {
        "name": job.name,
        "config": settings(job.config),
        "commit": version,
        "start": job.start,
        "training": job.training,
        "curve": [
            {"iteration": at, **e["success"], **cost(metrics[:at])} for at, e in zip(points, evaluations, strict=True)
        ],
        "tables": [evaluations[at]["table"] for at in (0, -1)],
        "train": [float(f"{m['train/success']:.4g}") for m in metrics],
        "episodes": sum(m["episodes"] for m in metrics),
        "seconds": round(sum(v for m in metrics for k, v in m.items() if k.startswith("seconds/")), 2),
        "phases": {name: round(total, 2) for name, total in totals(metrics, "seconds/").items()},
        "tokens": totals(metrics, "tokens/"),
        "signal": {name: [float(f"{m[name]:.4g}") for m in metrics] for name in SIGNAL if name in metrics[0]},
    }
    if (folder / FINAL).is_file():
        result["final"] = read_shares((folder / FINAL).read_text())
    add(job.results, result)
    for path in saved(folder)[:-1]:  # the last one is enough, now that nothing can cut it off
        remove(path)


def cost(metrics: list[dict]) -> dict[str, float]:
    """What these iterations took: tokens that the policy sampled, and the writer of skills; seconds of training, and
    those of them that went into writing. An evaluation costs nothing."""
    tokens, seconds = totals(metrics, "tokens/"), totals(metrics, "seconds/")
    seconds.pop("evaluate", None)
    return {
        "sampled": tokens.get("sampled", 0),
        "skills": tokens.get("skills", 0),
        "seconds": round(sum(seconds.values()), 2),
        "writing": round(seconds.get("skills", 0), 2),
    }


def totals(metrics: list[dict], kind: str) -> dict[str, float]:
    """Over all iterations, of those metrics whose names begin with `kind`."""
    names = dict.fromkeys(name for line in metrics for name in line if name.startswith(kind))
    return {name.removeprefix(kind): sum(line.get(name, 0) for line in metrics) for name in names}


def run_all(jobs: list[Job], launch: Callable[[Job], None], at_once: int = 2) -> None:
    """Make every run that is not there, `at_once` at a time. Where one fails the others go on, and the first error is
    raised at the end."""
    version = commit()
    missing = [job for job in jobs if not is_there(job)]
    for job in missing:
        check_folder(job)

    def make(job: Job) -> None:
        launch(job)
        store(job, version)
        print(f"{job.name} done", flush=True)

    with ThreadPoolExecutor(at_once) as pool:
        futures = [pool.submit(make, job) for job in missing]
    for future in futures:
        future.result()


def stored(results: Path, arms: Iterable[str]) -> dict[str, list[dict]]:
    """Arm -> the results of all its runs that a file holds, whoever made them; no `arms`: of all that there are."""
    found: dict[str, list[dict]] = {arm: [] for arm in arms}
    for line in read(results):
        if "curve" in line and (not arms or arm_of(line["name"]) in found):  # others are no runs of a comparison
            found.setdefault(arm_of(line["name"]), []).append(line)
    return {arm: sorted(runs, key=pair_of) for arm, runs in found.items() if runs}  # not in the order of their ends


def pair_of(result: dict) -> tuple[int, int]:
    """By what runs of two arms are compared: the training of the starting model, and the seed."""
    return training_of(result), result["config"]["seed"]


def told_by(table: Path) -> tuple[list[str], str]:
    """The arms and the baseline of a table that was made before; none where there is no table. Raises ValueError for a
    table of another kind."""
    if not table.exists():
        return [], "grpo"
    first = table.read_text().partition("\n\n")[0]
    baseline = re.search(r"\| ahead of (\S+) at equal episodes \|", first)
    if not baseline:
        raise ValueError(f"{table} is no table of today's compare.py: name its --methods, --arms and --baseline")
    return [row.split("|")[1].strip() for row in first.splitlines()[2:]], baseline[1]


def check_alike(found: dict[str, list[dict]]) -> None:
    """Raises ValueError where runs must not be compared: other starting weights, or another bench; and where the runs
    of one arm differ in more than their seed. Each training of the starting model has weights of its own."""
    first = next(iter(found.values()))[0]
    of_training: dict[int, dict] = {}  # training -> a run of it
    of_start: dict[str, dict] = {}  # fingerprint -> a run from it
    for arm, runs in found.items():
        bench, seen = set(BENCH) - ({"iterations", "eval_every"} if arm == LONGER else set()), set()
        for run in runs:
            same = of_training.setdefault(training_of(run), run)
            if run["start"] != same["start"]:
                raise ValueError(f"{run['name']} and {same['name']} are from other starting weights")
            other = of_start.setdefault(run["start"], run)
            if training_of(run) != training_of(other):
                raise ValueError(f"{run['name']} and {other['name']} are from the same starting weights")
            if others := [name for name in differing(first["config"], run["config"]) if name in bench]:
                raise ValueError(f"{run['name']} and {first['name']} have other settings of {', '.join(others)}")
            if others := [name for name in differing(runs[0]["config"], run["config"]) if name != "seed"]:
                raise ValueError(f"{run['name']} and {runs[0]['name']} have other settings of {', '.join(others)}")
            if pair_of(run) in seen:
                raise ValueError(f"{run['name']} has the starting weights and the seed of another run of {arm}")
            seen.add(pair_of(run))


def prepare(
    runs: Path, quick: bool, flags: list[str], model: str = "tiny", trainings: Sequence[int] = (0,)
) -> dict[int, Path]:
    """Training -> the folder of the weights that runs start from; and games, so that no two runs generate them at once.
    Raises ValueError where a folder was made from another model, or for another environment."""
    config = parse_args([*on_the_laptop(flags), "--model", model])
    for split in ("train", *eval_splits(config)):
        games_of(config, split)
    made, told = runs / "start.txt", f"{model} for {config.env}{', untrained' if quick else ''}"
    starts = {training: runs / ("start" if list(trainings) == [0] else f"start{training}") for training in trainings}
    runs.mkdir(parents=True, exist_ok=True)
    with FileLock(runs / "start.lock"):  # another comparison may be making it
        if any(start.is_dir() for start in starts.values()) and made.is_file() and made.read_text() != told:
            raise ValueError(f"{runs} holds runs from {made.read_text()}, not from {told}: use another --runs")
        for training, start in starts.items():
            if not start.is_dir():
                made.write_text(told)
                of_it = model.replace("{}", str(training))
                pair = untrained(training) if quick else load_model(of_it, env=config.env, training=training)
                write_whole(start, partial(save_policy, *pair))
    return starts


def untrained(seed: int):
    from tiny.warmstart import tiny_model, tiny_tokenizer

    tokenizer = tiny_tokenizer()
    return tiny_model(len(tokenizer), seed=seed, width=48), tokenizer


def read_command_line(argv: list[str] | None) -> tuple[argparse.Namespace, list[str], dict[str, str]]:
    """-> (options, flags of train.py that go to every run, arm -> its flags)."""
    known = read_arms()
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--methods", nargs="+", default=[], help="as --algo names them, by their defaults")
    parser.add_argument("--arms", nargs="+", default=[], help="variants of lab/experiments/arms.toml")
    parser.add_argument("--seeds", type=int, help="number of seeds (default: 10, with --quick 2)")
    parser.add_argument("--first-seed", type=int, default=0, help="the first of them (default: 0)")
    parser.add_argument("--trainings", type=int, default=1, help="number of starting models (default: 1)")
    parser.add_argument("--first-training", type=int, default=0, help="the seed of the first of them (default: 0)")
    parser.add_argument("--final-games", type=int, default=0, help="of each split, played in the end (default: none)")
    parser.add_argument("--at-once", type=int, default=2, help="runs at a time, one thread each (default: 2)")
    parser.add_argument("--baseline", help="the method or arm that others are compared with (default: grpo)")
    parser.add_argument("--model", default="tiny", help="what every run starts from, as for train.py (default: tiny)")
    parser.add_argument("--results", type=Path, help="NAME.jsonl, with NAME.md and NAME.png beside it")
    parser.add_argument(
        "--runs", type=Path, help="folder of the run folders and the starting weights (default: runs/NAME)"
    )
    parser.add_argument("--report", action="store_true", help="make no runs: table and figure of those that are there")
    parser.add_argument("--quick", action="store_true", help="an untrained model and two iterations: does it all work?")
    args, flags = parser.parse_known_args(argv)  # what is left goes to every run, such as --iterations 100
    args.results = (args.results or (ROOT / "runs/quick.jsonl" if args.quick else RESULTS / "compare.jsonl")).absolute()
    if args.results.suffix != ".jsonl":
        parser.error(f"--results {args.results} is no file NAME.jsonl")
    if args.at_once < 1:
        parser.error(f"--at-once is {args.at_once}, must be 1 or more")
    if args.seeds is not None and args.seeds < 1:
        parser.error(f"--seeds is {args.seeds}, must be 1 or more")
    if args.trainings < 1:
        parser.error(f"--trainings is {args.trainings}, must be 1 or more")
    if args.first_training < 0:
        parser.error(f"--first-training is {args.first_training}, must be 0 or more")
    several = args.model in TINY or args.model.startswith(PREFIX) or "{}" in args.model
    if args.trainings + args.first_training > 1 and not several:
        parser.error(f"there is one training of {args.model}: write {{}} for its number")
    if args.final_games < 0:
        parser.error(f"--final-games is {args.final_games}, must be 0 or more")
    if args.first_seed < 0:
        parser.error(f"--first-seed is {args.first_seed}, must be 0 or more")
    if args.quick and args.model != "tiny":
        parser.error("--quick takes an untrained model, no other --model")
    given = {flag.partition("=")[0] for flag in flags}
    if taken := {"--algo", "--seed", "--prompt", "--out"} & given:
        parser.error(f"{taken.pop()} differs from run to run: see --methods, --seeds and --runs")
    if args.report:  # of what is there, whatever it is called by now
        named = [*args.methods, *args.arms]
        with lm.one_line("compare.py"):
            told, baseline = ([], "grpo") if named else told_by(args.results.with_suffix(".md"))
        args.baseline = args.baseline or baseline
        return args, flags, dict.fromkeys(named or told, "")
    if not (args.methods or args.arms):
        parser.error("name what is compared: --methods, --arms or both")
    if unknown := [name for name in args.arms if name not in known]:
        parser.error(f"--arms: there is no {unknown[0]!r}, but {', '.join(known)}")
    for name in args.methods:
        try:
            variant_of(name)
        except ValueError as error:
            parser.error(f"--methods: {error}")
    arms = {name: f"--algo {name}" for name in args.methods} | {name: known[name] for name in args.arms}
    args.baseline = args.baseline or "grpo"
    if args.baseline not in {"grpo", *arms}:  # without grpo among them, no arm is compared with another
        parser.error(f"--baseline {args.baseline} is none of the methods and arms: {', '.join(arms)}")
    return args, flags, arms


def main(argv: list[str] | None = None) -> str:
    args, flags, arms = read_command_line(argv)
    if args.report:
        with lm.one_line("compare.py"):
            return report(stored(args.results, arms), args.baseline, args.results)
    flags = [*(QUICK.split() if args.quick else []), *flags]
    runs = (args.runs or ROOT / "runs" / args.results.stem).absolute()
    seeds = range(args.first_seed, args.first_seed + (args.seeds or (2 if args.quick else 10)))
    with lm.one_line("compare.py"):
        told_by(args.results.with_suffix(".md"))  # a table that could not be made again is refused before hours of runs
        trainings = range(args.first_training, args.first_training + args.trainings)
        starts = prepare(runs, args.quick, flags, args.model, trainings)
        jobs = jobs_of(arms, seeds, flags, starts, args.results, runs)
    children = Children()
    try:
        with children.stopped_by_signals():
            run_all(jobs, lambda job: launch(job, children, args.final_games), args.at_once)
    finally:  # one run that failed leaves the others' table
        with alone(args.results.parent):  # another comparison may be writing the same table
            beside, _ = told_by(args.results.with_suffix(".md"))
            found = stored(args.results, [*beside, *arms])
            text = report(found, args.baseline, args.results) if found else ""
    return text


def report(found: dict[str, list[dict]], baseline: str, results: Path) -> str:
    """Writes NAME.md and NAME.png beside NAME.jsonl. Raises ValueError where there is nothing to report, or what must
    not be in one table."""
    if not found:
        raise ValueError(f"{results} holds no result of these arms")
    check_alike(found)
    runs = runs_of(found)
    parts = [ends(runs, baseline), costs(runs, baseline), leads(runs, baseline)]
    parts += [by_run(runs), by_episodes(runs), by_type(runs)]
    text = "\n\n".join(part for part in parts if part)
    results.with_suffix(".md").write_text(text + "\n")
    draw(runs, results.with_suffix(".png"))
    print(text)
    return text


if __name__ == "__main__":
    main()
