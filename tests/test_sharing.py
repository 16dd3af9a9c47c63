"""What leaves a run: the model card, the upload to the Hub, the exported episodes; and what an installation brings."""

import json
import os
import re
import shlex
import subprocess
import sys
import threading
import tomllib
from dataclasses import replace
from fnmatch import fnmatch
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import datasets
import httpx2
import huggingface_hub
import pytest
import torch
import yaml
from huggingface_hub import ModelCard
from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled, RepositoryNotFoundError

import runlog.card
import tiny.demonstrations
import train as train_module
from config import RECIPES, Config, parse_args, variant_of
from lm.encoder import Encoder
from lm.loading import load_pretrained, save_policy
from runlog.card import OF_MACHINE, card, command_of, flags_over, named, origin_of, write_card
from runlog.start import start
from tests.settings import laptop
from tiny.coldstart import ColdStart
from tiny.demonstrations import Recorded, play_of
from tools import coldstart, export, push

ROOT = Path(__file__).parent.parent
SMALL = {"tasks": 2, "rollouts": 2, "max_steps": 4, "max_new_tokens": 6, "train_games": 6, "eval_games": 2}
SMALL |= {"mini_batch": 8, "learning_rate": 1e-3, "eval_every": 0, "sample_every": 1, "iterations": 1}
TABLE = "split            Pick     All     95% interval  games\nvalid_seen       50.0    50.0      [9.5, 90.5]      2"


def train(config: Config) -> Path:
    train_module.train(start(config), variant_of(config.algo))
    return Path(config.out)


@pytest.fixture
def run(random_tiny, tmp_path) -> Path:
    """A small run that has ended."""
    return train(laptop(**SMALL, out=str(tmp_path / "run")))


def evaluated(folder: Path, *records: dict) -> Path:
    """A folder with these evaluations, and a half-written one."""
    folder.mkdir(exist_ok=True)
    lines = "".join(json.dumps(record) + "\n" for record in records)
    (folder / "evaluations.jsonl").write_text(f'{lines}{{"iteration": 7, "suc')
    return folder


# ---- the model card --------------------------------------------------------------------------------------------------


def test_a_run_leaves_a_card_that_the_hub_reads(run, tmp_path):
    said = ModelCard.load(run / "policy" / "README.md")
    assert said.data.library_name == "transformers" and said.data.pipeline_tag == "text-generation"
    assert said.data.tags == ["opid", "reinforcement-learning", "alfworld"]
    assert said.data.base_model is None and said.data.license == "apache-2.0"
    last = json.loads((run / "evaluations.jsonl").read_text().splitlines()[-1])
    results = {result.dataset_split: result.metric_value for result in said.data.eval_results}
    assert results == {split: 100 * share for split, share in last["success"].items()} and len(results) == 2
    assert last["table"] in said.text and "95% interval" in last["table"]
    assert "2606.26790" in said.text and "python evaluate.py --model" in said.text
    assert "| `--tasks` | `2` | `16` |" in said.text and "`--temperature`" not in said.text
    assert str(tmp_path) not in said.content
    trained = re.search(r"```bash\n(python train\.py .*)\n```", said.text)[1]
    assert same_settings(parse_args(shlex.split(trained)[2:]), json.loads((run / "config.json").read_text()))


def same_settings(config: Config, before: dict) -> bool:
    after = config.to_dict()
    return {name for name in before | after if before.get(name) != after.get(name)} <= OF_MACHINE | {"fit"}


@pytest.mark.parametrize("algo", ["opid", "grpo", "sdar", "gigpo", "opid-contrast"])
@pytest.mark.parametrize("recipe", ["laptop", "laptop-search", "webshop-qwen3-1.7b", "one-card-alfworld-qwen3-0.6b"])
def test_the_cards_command_makes_the_same_settings(recipe, algo):
    flags = ["--seed", "3", "--no-reuse-cache", "--skill-prefill=--a'b"]
    made = parse_args(["--recipe", recipe, "--algo", algo, *flags])
    words = command_of(made)
    assert words[:2] == ["python", "train.py"] and len(words) < 40
    assert same_settings(parse_args(words[2:]), made.to_dict())


def test_the_cards_command_of_a_saved_policy_and_of_a_fitted_run(tmp_path, llama, tokenizer):
    acts = {"env": "search", "prompt": "compact", "context": "chat", "max_new_tokens": 9}
    save_policy(llama, tokenizer, tmp_path / "policy", {"base": "tiny", "date": "2026-01-02", "acts": acts})
    for flags in (["--no-skills-may-fail"], ["--recipe", "laptop", "--prompt", "compact"], ["--fit"]):
        made = replace(parse_args(["--model", str(tmp_path / "policy"), *flags]), token_budget=77)
        words = command_of(made)
        assert words[words.index("--model") + 1] == "policy"
        words[words.index("--model") + 1] = str(tmp_path / "policy")
        again = parse_args(words[2:])
        assert same_settings(again, made.to_dict()) and not again.fit  # the budgets are those that were chosen


@pytest.mark.parametrize(
    "text", ['algo = "gigpo"\nstate_weight = 0.5', 'env = "search"', '[env_options]\nengine = "fast"']
)
def test_a_recipe_whose_settings_no_flag_takes_back_is_not_named(text, tmp_path):
    (tmp_path / "r.toml").write_text(text)
    assert flags_over(laptop(), str(tmp_path / "r.toml")) is None
    (tmp_path / "r.toml").write_text("tasks = 3")
    assert flags_over(laptop(), str(tmp_path / "r.toml"))[:2] == ["--recipe", str(tmp_path / "r.toml")]


@pytest.fixture
def hub(monkeypatch):
    """What the cache of the Hub holds: (name, file) -> the text."""
    held = {}
    monkeypatch.setattr(runlog.card, "try_to_load_from_cache", lambda name, file: held.get((name, file)))
    return held


def test_the_base_is_named_where_the_hub_has_it(hub, tmp_path, monkeypatch):
    apache = {"license": "apache-2.0"}
    assert origin_of("smollm2") == origin_of("cold:smollm2") == {"base_model": runlog.card.SMOLLM2_HUB} | apache
    assert origin_of("tiny") == apache
    assert origin_of("Qwen/Qwen2.5-3B-Instruct")["license_name"] == "qwen-research"
    assert origin_of("runs/cold") == {}
    (tmp_path / "card").write_text("---\nlicense: mit\nbase_model: org/older\n---\n")
    hub[("org/model", "config.json")], hub[("org/model", "README.md")] = "here", str(tmp_path / "card")
    assert origin_of("org/model") == {"base_model": "org/model", "license": "mit"}
    monkeypatch.chdir(tmp_path)
    Path("org/model").mkdir(parents=True)  # a folder of this name is what was loaded
    assert origin_of("org/model") == {}


def test_the_licence_of_every_recipes_model_is_known(hub):
    models = {tomllib.loads(path.read_text()).get("model", "tiny") for path in RECIPES.glob("*.toml")}
    assert len(models) > 6 and all(origin_of(model)["license"] for model in models)


def test_a_folder_says_what_it_is_by_its_own_card(hub, tmp_path):
    (tmp_path / "README.md").write_text("---\nlicense: mit\nbase_model: org/older\n---\n")
    assert origin_of(str(tmp_path)) == {"license": "mit"}  # a model that somebody downloaded: of older, not older
    (tmp_path / "opid.json").write_text('{"base": "elsewhere/folder"}')
    assert origin_of(str(tmp_path)) == {"license": "mit", "base_model": "org/older"}
    (tmp_path / "README.md").write_text("---\nlicense: [1\nbase_model: /home/me/x\n---\n")
    assert origin_of(str(tmp_path)) == {}
    (tmp_path / "README.md").write_text("---\nbase_model: /home/me/x\nlicense: 3\n---\n")
    assert origin_of(str(tmp_path)) == {}


def test_text_from_outside_breaks_neither_yaml_nor_markdown(hub, tmp_path):
    bad = "m`|\n---\n# <b>"
    model, data = tmp_path / "secret" / bad, tmp_path / "secret" / "a|`data"
    model.mkdir(parents=True)
    config = laptop(model=str(model), env_options={"data": str(data)}, skill_prefill="\n```\n---\n\ud800", **SMALL)
    folder = tmp_path / 'x": [\n--- `|'
    record = {"iteration": 0, "success": {"valid\n---": 0.5, "other": None}, "table": "```\n\n---\n# no heading"}
    text = card(config, evaluated(folder, record))
    write_card(tmp_path, config, folder)
    said = ModelCard.load(tmp_path / "README.md")  # half a surrogate pair can be written
    assert said.data.model_name == 'x": [ --- `|' and [r.metric_value for r in said.data.eval_results] == [50.0]
    assert said.data.eval_results[0].dataset_split == "valid ---"
    assert "secret" not in text and "is not known here" in text
    outside = re.sub(r"(?m)^(`{3,})\w+\n(.*\n)*?\1$", "", said.text)
    assert re.findall("^# .*", outside, re.MULTILINE) == ["# `x\": [ --- '|`"]
    assert "<b>" in outside and "<b>" not in re.sub(r"`[^`\n]*`", "", outside)
    rows = [line for line in outside.splitlines() if line.startswith("| `--env-options`")]
    assert rows == ["| `--env-options` | `data=a\\|'data` | `none` |"]
    trained = re.search(r"^(`{4,})bash\n(python train.py .*?)\n\1$", said.text, re.MULTILINE | re.DOTALL)[2]
    words = shlex.split(trained)
    assert words[words.index("--model") + 1] == bad and "data=a|`data" in words


def test_names_stand_for_places():
    assert [named(text) for text in ("/home/me/alfworld", "C:\\Users\\me\\x", "~/x/", "../y", "/")] == [
        "alfworld",
        "x",
        "x",
        "y",
        "FOLDER",
    ]
    assert [named(text) for text in ("org/data", "generate", "http://me:key@10.0.0.1:8000")] == [
        "org/data",
        "generate",
        "ADDRESS",
    ]


def test_a_card_shows_the_policy_before_and_after(tmp_path):
    before, after = "before " + TABLE, "after " + TABLE
    records = [{"iteration": i, "success": {"valid_seen": 0.5}, "table": t} for i, t in ((-1, before), (0, after))]
    text = card(laptop(**SMALL), evaluated(tmp_path, *records))
    assert f"Before training:\n\n```text\n{before}" in text and f"After iteration 0:\n\n```text\n{after}" in text
    untrained = card(laptop(**SMALL), evaluated(tmp_path, records[0]))
    assert "No evaluation of the trained policy" in untrained and "model-index" not in untrained
    (tmp_path / "evaluations.jsonl").write_text("{\n{}\n[]\n")
    assert "No evaluation of the trained policy" in card(laptop(**SMALL), tmp_path)


@pytest.mark.parametrize(
    ("env", "options", "words"),
    [
        ("alfworld", {}, "a toy"),
        ("alfworld", {"size": "full"}, "a toy"),
        ("alfworld", {"data": "official"}, "Data from outside"),
        ("search", {"retriever": "http://x"}, "Data from outside"),
    ],
)
def test_a_card_says_whether_the_games_are_a_toy(env, options, words, tmp_path):
    config = parse_args(["--env", env, "--model", "smollm2"])
    assert words in card(replace(config, env_options=options), tmp_path)


def test_the_citation_is_that_of_the_repository():
    paper = yaml.safe_load((ROOT / "CITATION.cff").read_text())["references"][0]
    flat = " ".join(runlog.card.BIBTEX.split())
    assert " and ".join(f"{a['given-names']} {a['family-names']}" for a in paper["authors"]) in flat
    assert all(str(text) in flat for text in (paper["title"], paper["year"], paper["url"]))


def test_a_card_that_cannot_be_made_costs_no_policy(random_tiny, tmp_path, monkeypatch, capsys):
    def fails(model):
        raise ValueError("opid.json is damaged")

    monkeypatch.setattr(runlog.card, "origin_of", fails)
    run = train(laptop(**SMALL, out=str(tmp_path / "run")))
    assert (run / "policy" / "model.safetensors").is_file() and not (run / "policy" / "README.md").exists()
    assert "no model card is written: ValueError opid.json is damaged" in capsys.readouterr().out


# ---- the upload ------------------------------------------------------------------------------------------------------


class FakeHub:
    """HfApi, as far as it is used. `calls`: what was asked of it."""

    def __init__(self, repos=(), role="write", fails=None):
        self.repos, self.role, self.fails, self.calls = dict(repos), role, fails, []  # repository -> whether private

    def whoami(self):
        return {"name": "me", "orgs": [{"name": "lab"}], "auth": {"accessToken": {"role": self.role}}}

    def auth_check(self, repo, write):
        response = httpx2.Response(404 if repo not in self.repos else 403, request=httpx2.Request("GET", "http://hub"))
        if repo not in self.repos:
            raise RepositoryNotFoundError("no such repository", response=response)
        if not repo.startswith(("me/", "lab/")):
            raise HfHubHTTPError("403\nForbidden", response=response)

    def repo_info(self, repo):
        return SimpleNamespace(private=self.repos[repo])

    def create_repo(self, repo, private, exist_ok):
        self.calls.append(("create", repo, private, exist_ok))

    def create_commit(self, repo, operations, commit_message):
        if self.fails:
            raise self.fails
        files = {one.path_in_repo: one.path_or_fileobj for one in operations}
        self.calls.append(("commit", repo, files, commit_message))
        return SimpleNamespace(commit_url=f"https://hub/{repo}/commit/1")


@pytest.fixture
def fake(monkeypatch):
    """-> a function that takes the Hub's place."""

    def put(token="a token", **options) -> FakeHub:
        made = FakeHub(**options)
        monkeypatch.setattr(huggingface_hub, "HfApi", lambda: made)
        monkeypatch.setattr(huggingface_hub, "get_token", lambda: token)
        return made

    return put


def refused(argv: list, capsys, main=push.main) -> str:
    """The one line that a command ends with."""
    with pytest.raises(SystemExit) as ended:
        main([str(word) for word in argv])
    assert isinstance(ended.value.code, str) and "\n" not in ended.value.code
    return ended.value.code


def test_a_push_is_one_commit_of_the_policy_and_the_run(run, fake, capsys):
    (run / "report.html").write_text("<p>")
    settings = json.loads((run / "config.json").read_text())
    settings |= {"model": "/home/me/secret/model", "openai_base_url": "http://secret:80"}
    (run / "config.json").write_text(json.dumps(settings | {"env_options": {"data": "/home/secret/games"}}))
    hub = fake()
    push.main([str(run), "--repo", "me/opid", "--private"])
    (created, (_, repo, files, message)) = hub.calls
    assert created == ("create", "me/opid", True, True) and repo == "me/opid" and message.count("\n") == 0
    assert {"README.md", "model.safetensors", "config.json", "opid.json", "tokenizer.json"} <= files.keys()
    ours = {"curve.png", "report.html", "metrics.jsonl", "evaluations.jsonl", "config.json"}
    assert {place for place in files if place.startswith("run/")} == {f"run/{name}" for name in ours}
    uploaded = json.loads(files["run/config.json"])
    assert uploaded["model"] == "model" and uploaded["env_options"] == {"data": "games"}
    assert uploaded["out"] == "run" and uploaded["openai_base_url"] == "ADDRESS"
    assert uploaded.keys() == settings.keys() and uploaded["max_steps"] == 4
    texts = [c if isinstance(c, bytes) else Path(c).read_bytes() for c in files.values()]
    assert not any(b"secret" in text or str(run.parent).encode() in text for text in texts)
    assert capsys.readouterr().out == "https://hub/me/opid/commit/1\n"


def test_a_lora_runs_adapters_go_without_a_path(random_tiny, tmp_path, fake):
    pytest.importorskip("peft")
    run = train(laptop(**SMALL, lora_rank=2, out=str(tmp_path / "run")))
    adapters = run / "policy" / "adapters" / "adapter_config.json"
    adapters.write_text(json.dumps(json.loads(adapters.read_text()) | {"base_model_name_or_path": "/home/secret/b"}))
    hub = fake()
    push.main([str(run), "--repo", "me/opid"])
    files = hub.calls[1][2]
    assert json.loads(files["adapters/adapter_config.json"])["base_model_name_or_path"] == "b"
    assert "adapters/adapter_model.safetensors" in files and "adapters/README.md" not in files


def test_a_dry_run_asks_nobody(run, fake, monkeypatch, capsys):
    monkeypatch.setattr(huggingface_hub, "HfApi", None)
    push.main([str(run), "--repo", "me/opid", "--dry-run"])
    shown = capsys.readouterr().out
    assert " run/metrics.jsonl\n" in shown and " model.safetensors\n" in shown and "report.html" not in shown
    assert shown.endswith("files would go to me/opid; nothing was uploaded\n")


@pytest.mark.parametrize(
    ("repo", "options", "words"),
    [
        ("me/opid", {"token": None}, "hf auth login"),
        ("me/opid", {"role": "read"}, "may only read"),
        ("you/opid", {}, "makes repositories of me, lab alone"),
        ("you/opid", {"repos": {"you/opid": False}}, "403 Forbidden"),
        ("me/opid", {"repos": {"me/opid": False}}, "is public"),
        ("opid", {}, "is USER/NAME, not 'opid'"),
        ("me/o pid", {}, "me/o pid"),
        ("me/opid", {"fails": httpx2.ConnectError("no route\nto host")}, "no route to host"),
        ("me/opid", {"fails": RuntimeError("xet failed")}, "xet failed"),
        ("me/opid", {"fails": OfflineModeIsEnabled("HF_HUB_OFFLINE is set")}, "HF_HUB_OFFLINE is set"),
    ],
)
def test_what_the_hub_refuses_is_a_line(repo, options, words, run, fake, capsys):
    hub = fake(**options)
    assert words in refused([run, "--repo", repo, "--private"], capsys)
    assert [call for call in hub.calls if call[0] == "commit"] == []


def test_what_cannot_be_pushed_is_a_line(run, fake, tmp_path, capsys):
    hub = fake()
    assert "is not the folder of a run" in refused([tmp_path / "none", "--repo", "me/opid"], capsys)
    assert "is not the folder of a run" in refused([run / "policy", "--repo", "me/opid"], capsys)
    (run / "policy" / "README.md").unlink()
    assert "has no model card" in refused([run, "--repo", "me/opid"], capsys)
    (run / "policy").rename(run / "elsewhere")
    assert "has not ended" in refused([run, "--repo", "me/opid"], capsys)
    assert hub.calls == []


def test_a_run_asks_the_hub_first_and_keeps_all_where_the_upload_fails(random_tiny, tmp_path, fake, capsys):
    fake(token=None)
    with pytest.raises(ValueError, match="hf auth login"):
        start(laptop(**SMALL, out=str(tmp_path / "none"), push="me/opid"))
    assert not (tmp_path / "none").exists()
    hub = fake(fails=httpx2.ConnectError("gone"))
    run = train(laptop(**SMALL, out=str(tmp_path / "a b"), push="me/opid"))
    assert hub.calls == [("create", "me/opid", True, True)]
    line = capsys.readouterr().out.splitlines()[-1]
    assert line.startswith("not pushed: the Hub and me/opid: gone.")
    later = shlex.split(line.partition("later: ")[2])
    hub = fake()
    push.main(later[2:])
    assert later[:3] == ["python", "tools/push.py", str(run)] and len(hub.calls) == 2
    train(laptop(**SMALL | {"iterations": 2}, out=str(run), push="me/opid", resume=True))  # free to be asked for later
    assert len(hub.calls) == 4


def answers(asked: list):
    """A Hub on this machine, as far as an upload of small files needs it."""

    class Hub(BaseHTTPRequestHandler):
        def reply(self, status: int, body: dict, **headers: str) -> None:
            content = json.dumps(body).encode()
            self.send_response(status)
            for name, value in {"Content-Type": "application/json", "Content-Length": len(content), **headers}.items():
                self.send_header(name.replace("_", "-"), str(value))
            self.end_headers()
            self.wfile.write(content)

        def do_GET(self):
            if self.path.endswith("whoami-v2"):
                known = self.headers["Authorization"] == "Bearer good"
                body = {"name": "me", "orgs": [], "auth": {"accessToken": {"role": "write"}}}
                self.reply(200 if known else 401, body if known else {"error": "Invalid user token."})
            else:
                self.reply(404, {}, X_Error_Code="RepoNotFound")

        def do_POST(self):
            body = self.rfile.read(int(self.headers["Content-Length"])).decode()
            asked.append((self.path, body))
            if self.path.endswith("/create"):
                self.reply(200, {"url": f"http://{self.headers['Host']}/me/opid"})
            elif "/preupload/" in self.path:
                files = [file | {"uploadMode": "regular", "shouldIgnore": False} for file in json.loads(body)["files"]]
                self.reply(200, {"files": files})
            else:
                self.reply(200, {"commitUrl": f"http://{self.headers['Host']}/me/opid/commit/1", "commitOid": "1"})

        def log_message(self, *args):
            pass

    return Hub


def test_the_hubs_own_client_uploads_it(run):
    asked = []
    server = ThreadingHTTPServer(("127.0.0.1", 0), answers(asked))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    plain = {name: value for name, value in os.environ.items() if name != "HF_HUB_OFFLINE"}
    plain |= {"HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}", "HF_HUB_DISABLE_XET": "1", "NO_PROXY": "*"}

    def pushed(token: str) -> subprocess.CompletedProcess:
        words = [sys.executable, str(ROOT / "tools" / "push.py"), str(run), "--repo", "me/opid"]
        return subprocess.run(words, env=plain | {"HF_TOKEN": token}, capture_output=True, text=True)

    done = pushed("good")
    assert (done.returncode, done.stdout) == (0, f"{plain['HF_ENDPOINT']}/me/opid/commit/1\n"), done.stderr
    (_, made), (where, commit) = asked[0], asked[-1]
    assert json.loads(made)["name"] == "opid" and where.endswith("/me/opid/commit/main")
    places = [json.loads(line)["value"].get("path") for line in commit.splitlines()]
    assert {"README.md", "model.safetensors", "run/metrics.jsonl", "run/config.json"} <= set(places)
    wrong = pushed("bad")
    server.shutdown()
    server.server_close()
    for failed in (wrong, pushed("good")):  # no such token, nobody there
        assert failed.returncode == 1 and failed.stdout == ""
        assert failed.stderr.startswith("push.py: the Hub and me/opid: ") and failed.stderr.count("\n") == 1


# ---- the installation ------------------------------------------------------------------------------------------------

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def test_an_installation_has_every_module_recipe_and_datum():
    found = PROJECT["tool"]["setuptools"]
    assert sorted(found["py-modules"]) == sorted(path.stem for path in ROOT.glob("*.py"))
    patterns, data = found["packages"]["find"]["include"], found["package-data"]
    needed = [RECIPES / "laptop.toml", ROOT / "tiny/weights/alfworld.safetensors", ROOT / "envs/alfworld/data"]
    needed += [path for top in ROOT.glob("*/") for path in top.glob("**/*.py")]
    left_out = set()
    for path in needed:
        top = path.relative_to(ROOT).parts[0]
        if not (path.exists() and any(fnmatch(top, pattern) for pattern in patterns)):
            left_out.add(top)
    assert left_out - {".venv", "mutants", "build", "cache", "runs"} == {"lab", "tests"}
    assert data == {"*": ["*"]}


def test_the_projects_table_says_what_other_files_say():
    project = PROJECT["project"]
    changes = re.search(r"^## (\d+)-(\d+)-(\d+)$", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE).groups()
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert project["version"] == ".".join(changes) == str(cited["version"]).replace("-", ".")
    assert project["license"] == cited["license"]
    assert PROJECT["tool"]["setuptools"]["dynamic"]["dependencies"] == {"file": "requirements.txt"}
    assert project["requires-python"].removeprefix(">=") == PROJECT["tool"]["ty"]["environment"]["python-version"]


@pytest.mark.parametrize("name", PROJECT["project"]["scripts"])
def test_every_command_answers_from_another_folder(name, tmp_path):
    module, _, function = PROJECT["project"]["scripts"][name].partition(":")
    program = f"import sys; sys.argv[0] = {name!r}; from {module} import {function}; sys.exit({function}())"
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    words = [sys.executable, "-c", program, "--help"]
    done = subprocess.run(words, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.startswith("usage: "), done.stderr


# ---- exported episodes -----------------------------------------------------------------------------------------------


def step(**changes) -> dict:
    """As a run writes it."""
    plain = {"observation": "on desk see pen", "prompt": "<user> a pen <assistant>", "response": "take pen"}
    plain |= {"action": "take pen", "valid": True, "route": [{"level": "step", "text": "take it"}]}
    plain |= {"tokens": ["take", "pen"], "old_logprobs": [-0.5, -0.25], "skill_advantages": [0.5, None]}
    return plain | {"advantages": [1.0, None]} | changes


def sample(*steps: dict, **changes) -> dict:
    skills = {"summary": "done", "episode": "look first", "steps": {"0": "take it"}}
    plain = {"iteration": 3, "task": "put pen", "task_type": "pick", "game": "g", "group": 1, "success": True}
    return plain | {"skills": skills, "steps": list(steps)} | changes


def written(folder: Path, *samples: dict, end: str = "") -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "samples.jsonl").write_text("".join(json.dumps(s) + "\n" for s in samples) + end)
    return folder


def sampled(run: Path) -> list[dict]:
    """The records, with each prompt whole."""
    records = [json.loads(line) for line in (run / "samples.jsonl").read_text().splitlines()]
    for record in records:
        seen = ""
        for turn in record["steps"]:
            turn["prompt"] = seen = seen[: turn.get("kept", 0)] + turn["prompt"]
    return records


def loaded(folder: Path, tmp_path: Path) -> datasets.Dataset:
    """As a user would."""
    file = str(folder / "export" / "episodes.parquet")
    return datasets.load_dataset("parquet", data_files=file, split="train", cache_dir=str(tmp_path / "datasets"))


def test_a_runs_episodes_come_back_as_they_were(run, tmp_path, capsys):
    export.main([str(run)])
    assert capsys.readouterr().out == f"{run / 'export' / 'episodes.parquet'}: 4 episodes\n"
    rows, records = loaded(run, tmp_path), sampled(run)
    assert rows.features == export.features()
    for row, record in zip(rows, records, strict=True):
        own, now = record.pop("skills"), row.pop("skills")
        assert (now["summary"], now["episode"]) == (own["summary"], own["episode"])
        assert {str(skill["step"]): skill["text"] for skill in now["steps"]} == own["steps"]
        for before, after in zip(record.pop("steps"), row.pop("steps"), strict=True):
            assert all(after[name] == before[name] for name in before.keys() & after.keys() - set(export.NUMBERS))
            assert {"tokens", "route", "response", "valid"} <= before.keys() & after.keys()
            for name in before.keys() & set(export.NUMBERS):
                assert after[name] == pytest.approx(before[name])
        assert row == record
    card = (run / "export" / "README.md").read_text()
    assert yaml.safe_load(card.split("---")[1])["configs"][0]["data_files"] == "episodes.parquet"
    assert "old_logprobs" in card and "4 episodes" in card


def test_hostile_text_and_half_written_samples_are_exported(tmp_path):
    hostile = "\"'`\n\t\x00 \ud800 é 漢"
    bad = step(observation=hostile, response=hostile, tokens=[hostile, ""], route=[{"level": "step", "text": hostile}])
    infinite = step(old_logprobs=[float("nan"), float("-inf")], outcome_advantage=float("nan"))
    skills = {"summary": hostile, "episode": hostile, "steps": {"12": hostile, "3": "b"}}
    first, second = sample(bad, infinite, skills=skills), sample(skills=None, success=False, steps=[])
    folder = written(tmp_path / "run", first, second, end=json.dumps(first)[:-9])
    export.main([str(folder)])
    rows, said = loaded(folder, tmp_path), hostile.replace("\ud800", "?")
    assert len(rows) == 2 and rows[1]["skills"] is None and rows[1]["steps"] == []
    shown, other = rows[0]["steps"]
    assert shown["observation"] == shown["response"] == shown["tokens"][0] == shown["route"][0]["text"] == said
    assert {skill["step"]: skill["text"] for skill in rows[0]["skills"]["steps"]} == {12: said, 3: "b"}
    assert shown["advantages"] == [1.0, None] and shown["ratios"] is None and shown["guided"] == []
    assert other["old_logprobs"] == [None, None] and other["outcome_advantage"] is None


def test_what_later_versions_keep_of_a_step_is_exported(tmp_path):
    first = step(prompt="<user> a pen <assistant>", kept=0, outcome_advantage=-1.5, ratios=[1.0, 0.5], clipped=[0, 1])
    edit = {"episode": [12, 0, " skill x"], "step": [7, 5, "no"]}
    scored = {"episode": [-1.0, None], "step": [-2.0, -3.0]}
    second = step(prompt=" take <user> b", kept=12, skill_prompts=edit, skill_logprobs=scored)
    folder = written(tmp_path / "run", sample(first, second, unknown=1))
    export.main([str(folder)])
    one, two = loaded(folder, tmp_path)[0]["steps"]
    assert (one["outcome_advantage"], one["ratios"]) == (-1.5, [1.0, 0.5])
    assert two["prompt"] == "<user> a pen take <user> b"
    assert two["guided"] == [
        {"level": "episode", "prompt": "<user> a pen skill x take <user> b", "logprobs": [-1.0, None]},
        {"level": "step", "prompt": "<user> no take <user> b", "logprobs": [-2.0, -3.0]},
    ]


def test_a_run_without_skills_and_one_that_was_resumed(random_tiny, tmp_path):
    settings = SMALL | {"algo": "grpo", "save_every": 1, "out": str(tmp_path / "run")}
    run = train(laptop(**settings | {"iterations": 2}))
    with open(run / "samples.jsonl", "a") as file:
        file.write(json.dumps(sample(step(), iteration=2)) + "\n")  # of an iteration that was lost
    train(laptop(**settings | {"iterations": 3}, resume=True))
    export.main([str(run)])
    rows = loaded(run, tmp_path)
    assert rows["iteration"][:] == [0] * 4 + [1] * 4 + [2] * 4 and set(rows["task"]) != {"put pen"}
    assert rows["skills"][:] == [None] * 12
    steps = [step for steps in rows["steps"] for step in steps]
    assert all(step["route"] == [] and set(step["skill_advantages"]) == {None} for step in steps)


@pytest.mark.parametrize(
    ("samples", "end", "words"),
    [
        ([], "{", "no whole episode yet"),
        ([sample(step())], '{"half": \n', "line 2 of"),
        ([sample(step()), {"iteration": 1}], "", "record 2 of"),
        ([sample(step(tokens=3))], "", "record 1 of"),
        ([sample(step(old_logprobs="x"))], "", "record 1 of"),
        ([sample(step(), iteration=2**40)], "", "2"),
    ],
)
def test_samples_that_are_none_are_a_line(samples, end, words, tmp_path, capsys):
    folder = written(tmp_path / "run", *samples, end=end)
    assert words in refused([folder], capsys, export.main)
    assert not (folder / "export").exists()


def test_an_export_takes_no_others_folder(tmp_path, capsys):
    folder = written(tmp_path / "run", sample(step()))
    assert "no samples.jsonl" in refused([tmp_path], capsys, export.main)
    assert "holds something else" in refused([folder, "--out", folder], capsys, export.main)
    assert "holds something else" in refused([folder, "--out", folder / "samples.jsonl"], capsys, export.main)
    (tmp_path / "empty").mkdir()
    for _ in range(2):  # an earlier export is replaced
        export.main([str(folder), "--out", str(tmp_path / "empty")])
    assert sorted(path.name for path in (tmp_path / "empty").iterdir()) == ["README.md", "episodes.parquet"]


# ---- a cold start on them --------------------------------------------------------------------------------------------


@pytest.fixture
def exported(run) -> str:
    export.main([str(run)])
    return str(run / "export" / "episodes.parquet")


@pytest.fixture
def untrained(tmp_path, llama, tokenizer) -> str:
    save_policy(llama, tokenizer, tmp_path / "untrained")
    return str(tmp_path / "untrained")


def demonstrations(exported: str, tokenizer, only: str = "all", **options) -> list:
    return tiny.demonstrations.recorded(Recorded(tokenizer, 0, **options), exported, only)


def test_demonstrations_are_what_the_policy_saw_and_said(exported, run, tokenizer):
    learnt = []
    for sequence in demonstrations(exported, tokenizer):
        for _, at, size in sequence.responses:
            learnt.append((tokenizer.decode(sequence.ids[:at]), tokenizer.decode(sequence.ids[at : at + size])))
    written = [answer for prompt, answer in learnt if prompt.endswith("write skills <assistant>")]
    steps = [step for record in sampled(run) for step in record["steps"] if step["valid"]]  # others are seen alone
    said = [(step["prompt"], f"{step['response']} <end>".strip()) for step in steps]
    assert sorted(said) == sorted(pair for pair in learnt if pair[1] not in written) and len(said) < 16
    assert len(written) == 4 and all("open every closed place" in text and "look in bed" in text for text in written)


def test_another_models_template_has_its_own_words_around_them(exported, tokenizer):
    tokenizer = tokenizer.__class__(tokenizer_object=tokenizer.backend_tokenizer, unk_token="<unk>", eos_token="<end>")
    tokenizer.chat_template = (
        "{% for m in messages %}{% if m['role'] == 'assistant' %}{{ m['content'] }}<end>"
        "{% else %}before {{ m['content'] }} now{% endif %}{% endfor %}"
    )
    opening = tokenizer.decode(demonstrations(exported, tokenizer, context="window")[0].ids)
    assert opening.startswith("before task ") and "<user>" not in opening
    assert Encoder(tokenizer, "window").context(["task"], []) == tokenizer("before task now")["input_ids"]


def test_a_cold_start_learns_a_runs_episodes(exported, untrained, tmp_path, capsys):
    words = ["--demonstrations", exported, "--only", "all", "--model", untrained, "--eval-games", "0"]
    coldstart.main([*words, "--learning-rate", "0.01", "--out", str(tmp_path / "cold")])
    assert re.search(r"^1 steps in ", capsys.readouterr().out, re.MULTILINE)
    before, after = (load_pretrained(folder)[0].state_dict() for folder in (untrained, str(tmp_path / "cold")))
    assert any(not torch.equal(before[name], after[name]) for name in before)
    rows = datasets.load_dataset("parquet", data_files=exported, split="train", cache_dir=str(tmp_path / "datasets"))
    rows.select([0]).to_parquet(exported)  # other episodes under the same name
    stopped = refused([*words, "--learning-rate", "0.01", "--out", tmp_path / "cold"], capsys, coldstart.main)
    assert "on another" in stopped


def test_only_successes_are_learnt_unless_told_otherwise(exported, tokenizer, tmp_path):
    with pytest.raises(ValueError, match="no episode that succeeded"):
        demonstrations(exported, tokenizer, "successes")
    rows = datasets.load_dataset("parquet", data_files=exported, split="train", cache_dir=str(tmp_path / "datasets"))
    won = rows.map(lambda row, i: {"success": i == 1}, with_indices=True)
    won.to_parquet(exported)
    only, every = (demonstrations(exported, tokenizer, which) for which in ("successes", "all"))
    task = rows[1]["task"]
    assert only and len(only) < len(every) and all(task in tokenizer.decode(s.ids) for s in only)


def test_what_cannot_be_learnt_is_a_line(exported, untrained, tmp_path, capsys):
    def said(*words, file=exported) -> str:
        given = ["--demonstrations", file, "--only", "all", "--model", untrained, "--out", tmp_path / "cold"]
        return refused([*given, *words], capsys, coldstart.main)

    assert "goes otherwise than recorded" in said("--prompt", "official")
    assert "search" in said("--env", "search")
    assert "--games does nothing with" in said("--games", "3")
    assert "--learns does nothing with" in said("--learns", "playing")
    assert "No such file" in said(file=tmp_path / "none.parquet")
    assert "arquet" in said(file=ROOT / "README.md")
    datasets.Dataset.from_list([{"text": "a"}]).to_parquet(tmp_path / "other.parquet")
    assert "no export of tools/export.py" in said(file=tmp_path / "other.parquet")
    assert "needs --out" in refused(["--demonstrations", exported, "--model", untrained], capsys, coldstart.main)
    with pytest.raises(ValueError, match="--only does nothing without"):
        ColdStart(only="all")
    assert not (tmp_path / "cold" / "coldstart.json").exists()


def test_a_step_skill_too_many_is_left_out_as_the_prompt_asks():
    skills = [{"step": t, "text": "x"} for t in (9, 2, 5, 1)]
    row = sample(step()) | {"skills": {"summary": "", "episode": "e", "steps": skills}}
    assert list(play_of(row, "file").skills.steps) == [1, 2, 5]
