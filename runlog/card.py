"""What a run shows of itself on the Hugging Face Hub: the model card in the policy's folder, and what is uploaded.

A card names things; it holds no path of the machine that trained. Text from outside stands in it as code, on one line.
"""

from __future__ import annotations

import json
import os
import re
import shlex
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from dataclasses import MISSING, fields
from pathlib import Path

from huggingface_hub import EvalResult, ModelCardData, metadata_load, try_to_load_from_cache
from huggingface_hub.errors import HFValidationError, HTTPError, RepositoryNotFoundError
from huggingface_hub.utils import validate_repo_id
from yaml import YAMLError

from config import RECIPES, CommandLine, Config, every_setting, flag
from envs.guard import one_line
from lm.adapters import base_of
from lm.loading import SMOLLM2_HUB, about_policy, policy_in, read_json
from runlog.metrics import read_lines
from tiny.coldstart import PREFIX
from tiny.plays import TINY

CARD = "README.md"
# Of the models that recipes name, as the Hub spells it. Others say it in a card of their own, or it is left out.
APACHE = {"license": "apache-2.0"}
LICENCES = dict.fromkeys((*TINY, SMOLLM2_HUB, "Qwen/Qwen3-0.6B", "Qwen/Qwen3-1.7B"), APACHE)
LICENCES |= dict.fromkeys(("Qwen/Qwen2.5-1.5B-Instruct", "Qwen/Qwen2.5-7B-Instruct"), APACHE)
LICENCES["Qwen/Qwen2.5-3B-Instruct"] = {"license": "other", "license_name": "qwen-research"}
ORIGIN = ("base_model", "license", "license_name", "license_link")  # what a card says of where its model comes from
ON_HUB = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")  # what a name there looks like

# Settings of one machine or one start, which change no weight; and those that a card says elsewhere
OF_MACHINE = {"out", "resume", "plan", "plan_for", "device", "tracker", "strict", "push", "openai_base_url"}
OF_MACHINE |= {"save_every", "keep_checkpoints", "sample_every"}
UNSAID = {"model", "env", "algo", "seed", "fit"} | OF_MACHINE
METHODS = {"opid": "OPID", "grpo": "GRPO, the baseline of OPID"}

BIBTEX = """\
@misc{opid2026,
  title  = {OPID: On-Policy Skill Distillation for Agentic Reinforcement Learning},
  author = {Shuo Yang and Jinyang Wu and Zhengxi Lu and Yuhao Shen and Fan Zhang and Lang Feng and Shuai Zhang and
            Haoran Luo and Zheng Lian and Zhengqi Wen and Jianhua Tao},
  year   = {2026},
  eprint = {2606.26790},
  archivePrefix = {arXiv},
  url    = {https://arxiv.org/abs/2606.26790}
}"""


def write_card(policy: Path, config: Config, folder: Path) -> None:
    """README.md beside the weights in `policy`, of the run in `folder`."""
    try:
        text = card(config, folder)
    except Exception as error:  # whatever it is, it is no reason to lose the policy of hours of work
        print(f"WARNING: no model card is written: {type(error).__name__} {one_line(error)}")
        return
    (policy / CARD).write_text(text, encoding="utf-8", errors="replace")


def card(config: Config, folder: Path) -> str:
    """The text of the model card."""
    evaluations, name = evaluations_of(folder), one_line(folder.absolute().name, 100) or "opid"
    origin = origin_of(config.model)
    data = ModelCardData(
        base_model=origin.get("base_model"),
        license=origin.get("license"),
        license_name=origin.get("license_name"),
        license_link=origin.get("license_link"),
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["opid", "reinforcement-learning", config.env, *({config.algo} - {"opid"})],
        model_name=name,
        eval_results=results_of(config, evaluations) or None,
    )
    if not data.eval_results:
        data.model_name = None  # the Hub reads it as a part of the results
    parts = [summary(config, name), differences(config), held_out(evaluations), again(config, name), USE]
    parts += [limits(config), licence_words(config, origin), f"## Citation\n\n{fenced(BIBTEX, 'bibtex')}"]
    return f"---\n{data.to_yaml()}\n---\n\n" + "\n\n".join(parts) + "\n"


# ---- what stands in it -----------------------------------------------------------------------------------------------

USE = """\
## Load and play it

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("policy")  # this folder, or its name on the Hub
tokenizer = AutoTokenizer.from_pretrained("policy")
```

`opid.json` says how it acts: environment, prompt style, lengths. The code reads it from the folder:

```bash
hf download USER/NAME --local-dir policy  # where the folder is not here yet
python evaluate.py --model policy
```"""


def summary(config: Config, name: str) -> str:
    method = METHODS.get(config.algo, f"{code(config.algo)}, a relative of OPID")
    rows = [
        ("base model", code(model_name(config.model))),
        ("method", f"{method} ([arXiv 2606.26790](https://arxiv.org/abs/2606.26790))"),
        ("environment", f"{code(config.env)}, {config.prompt} prompts"),
        ("iterations", f"{config.iterations}, of {config.tasks} tasks x {config.rollouts} episodes each"),
        ("seed", str(config.seed)),
    ]
    return f"# {code(name)}\n\n" + table(("", ""), rows)


def differences(config: Config) -> str:
    """The settings that are not the paper's, which are the defaults of config.py."""
    rows = []
    for f in fields(config):
        usual = f.default if f.default is not MISSING else {}
        if f.name not in UNSAID and (value := getattr(config, f.name)) != usual:
            value = f"{len(value)} characters" if f.name == "skill_prefill" else spelled(f.name, value)
            rows.append((code(flag(f.name)), code(value), code(spelled(f.name, usual))))
    shown = table(("setting", "here", "paper"), rows) if rows else "None: this is the paper's ALFWorld run."
    return f"## Settings that differ from the paper's\n\n{shown}"


def held_out(evaluations: list[dict]) -> str:
    before, trained = evaluations[:1], [record for record in evaluations if record["iteration"] >= 0][-1:]
    words = "## Held-out success\n\nIn %, without skills, with its 95% interval and the number of games."
    for record in [*(before if before != trained else []), *trained]:
        at = record["iteration"]
        words += (
            f"\n\n{f'After iteration {at}' if at >= 0 else 'Before training'}:\n\n{fenced(record['table'], 'text')}"
        )
    return words if trained else f"{words}\n\nNo evaluation of the trained policy can be read."


def again(config: Config, name: str) -> str:
    command = shlex.join([*command_of(config), "--out", f"runs/{name}"])
    return (
        f"## Train it again\n\nThe same settings and seed, on one machine, make the same weights. A folder or an "
        f"address is named without its path.\n\n{fenced(command, 'bash')}"
    )


def limits(config: Config) -> str:
    lines = [f"- One seed ({config.seed}): another one may end elsewhere, and nothing here says how far."]
    data = {config.env_options.get(name, "generate") for name in ("data", "questions", "retriever")}
    if config.env not in ("alfworld", "search", "webshop"):
        lines.append("- The environment is one of its author's own, which this card knows nothing about.")
    elif data == {"generate"}:
        lines.append(
            "- The environment is a toy: games that the code generates in the benchmark's format. Numbers of the "
            "benchmark itself do not compare with these."
        )
    else:
        lines.append("- Data from outside were used in part or in whole; the settings above name them.")
    lines.append("- It plays this environment with these prompts. As an assistant it has not been tested.")
    return "## Limits\n\n" + "\n".join(lines)


def licence_words(config: Config, origin: dict[str, str]) -> str:
    source, licence = code(origin.get("base_model", model_name(config.model))), origin.get("license")
    if licence is None:
        said = f"The licence of {source} is not known here, and so left out above. It holds for these weights, too."
    else:
        said = f"That of {source}: {code(origin.get('license_name', licence))}."
    return (
        f"## Licence\n\n{said} The environment's data have licences of their own. WebShop's rules and words are for "
        "research only; Search QA's facts are [GeoNames](https://www.geonames.org)' (CC BY 4.0)."
    )


# ---- the run behind it -----------------------------------------------------------------------------------------------


def evaluations_of(folder: Path) -> list[dict]:
    """Those that can be read, in order."""
    try:
        records = read_lines(folder / "evaluations.jsonl")
    except (OSError, ValueError):
        return []
    kinds = {"iteration": int, "success": dict, "table": str}
    return [record for record in records if all(isinstance(record.get(key), kind) for key, kind in kinds.items())]


def results_of(config: Config, evaluations: list[dict]) -> list[EvalResult]:
    """The last evaluation as a model-index has it: a result a split, in %."""
    last = evaluations[-1]["success"] if evaluations and evaluations[-1]["iteration"] >= 0 else {}
    return [
        EvalResult(
            task_type="reinforcement-learning",
            dataset_type=config.env,
            dataset_name=config.env,
            dataset_split=one_line(split),
            metric_type="success_rate",
            metric_name="held-out success, %",
            metric_value=round(100 * share, 1),
        )
        for split, share in last.items()
        if isinstance(share, int | float)
    ]


def origin_of(model: str) -> dict[str, str]:
    """What is known of the base model: its name on the Hub, and its licence, as a card has them (ORIGIN)."""
    own = said_by(model)
    if "base_model" in own and about_policy(model):  # a policy's card: its base may be a folder of another machine
        return own
    own.pop("base_model", None)  # what that model was made from, or no name on the Hub
    adapted = base_of(model) if Path(model).is_dir() else None  # of a name on the Hub it would ask the Hub
    source = (adapted or about_policy(model).get("base", model)).removeprefix(PREFIX)
    base = SMOLLM2_HUB if source == "smollm2" else source
    if base in TINY or not (base in LICENCES or on_hub(base)):
        return LICENCES.get(base, own)
    return {"base_model": base} | (LICENCES.get(base) or own)


def said_by(model: str) -> dict[str, str]:
    """ORIGIN in a model's own card, in its folder or in the Hub's cache."""
    path = Path(model, CARD) if Path(model).is_dir() else Path(in_cache(model, CARD) or "")
    try:
        said = (metadata_load(path) if path.is_file() else None) or {}
    except (OSError, ValueError, YAMLError):
        return {}
    kept = {key: said[key] for key in ORIGIN if isinstance(said.get(key), str)}
    if not ON_HUB.fullmatch(kept.get("base_model", "")):  # a folder of its author's
        kept.pop("base_model", None)
    return kept


def on_hub(name: str) -> bool:
    """Whether a model was loaded from the Hub by this name: the cache has its architecture, or that of adapters."""
    files = ("config.json", "adapter_config.json")
    return not Path(name).is_dir() and any(in_cache(name, file) is not None for file in files)


def in_cache(name: str, file: str) -> str | None:
    try:
        found = try_to_load_from_cache(name, file)
    except HFValidationError:  # no name that the Hub could have
        return None
    return found if isinstance(found, str) else None


def command_of(config: Config) -> list[str]:
    """The command that trains with these settings again: the recipe that leaves the fewest flags to give, and these.
    Raises ValueError where no flags make them."""
    starts = [flags_over(config, recipe) for recipe in (None, *sorted(path.stem for path in RECIPES.glob("*.toml")))]
    found = [words for words in starts if words is not None]
    if not found:
        raise ValueError("no flags of train.py make these settings")
    return ["python", "train.py", *min(found, key=len)]


def flags_over(config: Config, recipe: str | None) -> list[str] | None:
    """What to give beside a recipe; None where flags alone do not make these settings of it."""
    line = CommandLine(recipe, config.model, config.env, config.algo)
    own = {f.name: f.default if f.default is not MISSING else {} for f in fields(config)}
    below = own | line.starts_from(every_setting(config.algo))[1]
    options = ("env_options", "template_options")
    if below.keys() - own.keys() or below["env"] != config.env:
        return None
    if any(below[name].keys() - getattr(config, name).keys() for name in options):  # flags only add to these
        return None
    words = ["--recipe", recipe] if recipe else []
    settings = config.to_dict() | {"fit": False}  # what it chose is among the settings
    for name, value in settings.items():
        asked = recipe is None and name in ("model", "env")  # they decide which settings are below the flags
        if name in OF_MACHINE or (value == below[name] and not asked):
            continue
        if isinstance(value, bool):
            words.append(flag(name) if value else "--no-" + flag(name)[2:])
        elif name in options:
            words += [flag(name), *spelled_pairs(name, value)]
        else:
            text = spelled(name, value)  # one that begins as a flag does would be taken for one
            words += [f"{flag(name)}={text}"] if text.startswith("-") else [flag(name), text]
    return words


# ---- how it is spelled -----------------------------------------------------------------------------------------------


def spelled(name: str, value) -> str:
    """A setting's value as the command line takes it, less paths."""
    if isinstance(value, dict):
        return " ".join(spelled_pairs(name, value)) or "none"
    if name == "model":
        return model_name(value)
    return "none" if value is None else str(value)


def spelled_pairs(name: str, options: dict[str, str]) -> list[str]:
    return [f"{key}={named(value) if name == 'env_options' else value}" for key, value in options.items()]


def model_name(model: str) -> str:
    source = model.removeprefix(PREFIX)
    return model[: len(model) - len(source)] + (source if on_hub(source) else named(source))


def named(text: str) -> str:
    """A folder by its name alone, and no address of a server. Names that the Hub could have stay as they are."""
    if "://" in text:
        return "ADDRESS"
    if ON_HUB.fullmatch(text) and not Path(text).exists():
        return text
    return re.split(r"[/\\]", text.rstrip("/\\"))[-1] or "FOLDER"


def code(text: str) -> str:
    """Text from outside as inline code, which no letter of it can end."""
    return f"`{one_line(text).replace('`', chr(39)) or ' '}`"


def fenced(text: str, language: str) -> str:
    """Text as a block of code, whose fence is longer than any in it."""
    fence = "`" * (max((len(run) for run in re.findall("`+", text)), default=0) + 1)
    fence = max(fence, "```", key=len)
    return f"{fence}{language}\n{text}\n{fence}"


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ("---",) * len(head), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


# ---- uploading it ----------------------------------------------------------------------------------------------------

FILES = ("curve.png", "report.html", "metrics.jsonl", "evaluations.jsonl", "config.json")  # of the run, where they are
PLACES = ("model", "out", "base", "base_model_name_or_path", "openai_base_url")  # keys whose values may be paths
WITH_PLACES = ("run/config.json", "opid.json", "adapters/opid.json", "adapters/adapter_config.json")


def to_upload(folder: Path) -> dict[str, Path]:
    """Path in the repository -> file: the policy at its root, the run's own in run/. Raises ValueError where the folder
    holds no run, or one without a policy and its card."""
    if not (folder / "start.json").is_file():
        raise ValueError(f"{folder} is not the folder of a run: there is no start.json in it")
    policy = Path(policy_in(folder))
    if not (policy / CARD).is_file():
        raise ValueError(f"{policy} has no model card: train.py with --resume and the run's own flags writes it")
    found = {path.relative_to(policy).as_posix(): path for path in sorted(policy.rglob("*")) if path.is_file()}
    found.pop(f"adapters/{CARD}", None)  # peft's form: blank, but for the base's folder
    return found | {f"run/{name}": folder / name for name in FILES if (folder / name).is_file()}


def without_places(settings: dict) -> dict:
    """The settings of a file that is uploaded, with names in place of folders and addresses."""
    kept = {}
    for key, value in settings.items():
        if key == "env_options" and isinstance(value, dict):
            value = {option: named(str(text)) for option, text in value.items()}
        elif isinstance(value, dict):
            value = without_places(value)
        elif key in PLACES and isinstance(value, str):
            value = model_name(value)
        kept[key] = value
    return kept


@contextmanager
def in_one_line(repo: str) -> Generator[None]:
    """Around what asks the Hub. Raises ValueError for all that may go wrong there."""
    try:
        yield
    except (HTTPError, OSError, RuntimeError, HFValidationError) as error:
        why = one_line(error) or type(error).__name__
        raise ValueError(f"the Hub and {repo}: {why}") from error


def check_writable(repo: str, *, private: bool) -> None:
    """Raises ValueError where this machine's token may not write to `repo`, USER/NAME, or not make it; and where it is
    to be `private` and is not."""
    from huggingface_hub import HfApi, get_token

    with in_one_line(repo):
        validate_repo_id(repo)
        owner, sign, _ = repo.partition("/")
        if not sign:
            raise ValueError(f"a repository on the Hub is USER/NAME, not {repo!r}")
        if not get_token():
            raise ValueError("no token of the Hugging Face Hub is here: hf auth login, or set HF_TOKEN")
        me = HfApi().whoami()
        if me.get("auth", {}).get("accessToken", {}).get("role") == "read":
            raise ValueError(f"this token of the Hugging Face Hub may only read: {repo} needs one that may write")
        try:
            HfApi().auth_check(repo, write=True)
            if private and not HfApi().repo_info(repo).private:
                raise ValueError(f"{repo} is public: take another one, or tools/push.py without --private")
        except RepositoryNotFoundError:  # it can be made where its owner is this user, or a group of theirs
            owners = [me["name"], *(group["name"] for group in me.get("orgs", []))]
            if owner not in owners:
                whose = ", ".join(owners)
                raise ValueError(f"{repo} is not there, and this token makes repositories of {whose} alone") from None


def push(folder: Path, repo: str, *, private: bool) -> str:
    """Everything of `to_upload` in one commit -> its address. Raises ValueError where that fails, in one line."""
    from huggingface_hub import CommitOperationAdd, HfApi

    files = to_upload(folder)
    check_writable(repo, private=private)
    operations = []
    for place, path in files.items():
        cleaned = place in WITH_PLACES
        content = json.dumps(without_places(read_json(path)), indent=2).encode() + b"\n" if cleaned else os.fspath(path)
        operations.append(CommitOperationAdd(place, content))
    with in_one_line(repo):
        HfApi().create_repo(repo, private=private, exist_ok=True)
        message = f"The policy of the run {one_line(folder.absolute().name)}, its card and its metrics"
        return HfApi().create_commit(repo, operations, commit_message=message).commit_url


def pushed(folder: Path, repo: str) -> str:
    """`push` at the end of a run, to a private repository -> a line on how that went."""
    try:
        return f"pushed: {push(folder, repo, private=True)}"
    except ValueError as error:
        again = shlex.join(["python", "tools/push.py", str(folder), "--repo", repo, "--private"])
        return f"not pushed: {error}. All is in {folder}; later: {again}"
