"""The cold start of any model: its demonstrations are what a rollout shows, its training is exact and resumable."""

import hashlib
import json
import re
import signal
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from templates import TEMPLATES, byte_tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer

import tiny.coldstart
import tiny.demonstrations
import tiny.warmstart
from config import Config
from envs import make_env
from envs.webshop import compact
from lm.answers import parse_skills
from lm.encoder import Encoder
from lm.loading import load_pretrained, save_policy
from lm.scoring import Sequence
from rollout import rollout
from tests.settings import laptop
from tiny.coldstart import ColdStart, cold_start, folder_of, save_checkpoint, write_record
from tiny.demonstrations import HISTORY, Demonstrator, demonstrations, plays_alone
from tiny.loading import load_model
from tiny.plays import script
from tiny.supervised import demonstration_loss, latest, shuffled_batches
from tiny.warmstart import TinyDemonstrator, key_of, tiny_model, tiny_tokenizer, warm_start
from tools.coldstart import main, stop
from tools.skill_quality import agreement
from variants.skill_grpo import UnderSkill

ENVS = ("alfworld", "search", "webshop")
# A hash of the demonstrations of four games, and the losses of the first training steps of a small model on them. They
# change where the tiny model's weights do, and then only.
BEFORE = {
    "alfworld": ("a168379fb3493d04", [6.075369, 5.912416, 5.811403]),
    "search": ("ccd7fdb771a60401", [7.113288, 7.006314]),
    "webshop": ("fa7b9e075d58a729", [5.947375, 5.840919, 5.689723]),
}


class Reciter:
    """A sampler for `rollout` that says what was said before."""

    def __init__(self, responses: list[list[int]]):
        self.responses, self.recorded = iter(responses), None
        self.model, self.config = torch.nn.Identity(), SimpleNamespace(max_new_tokens=1)

    def rows(self, length: int) -> int:
        return 1

    def __call__(self, live, contexts):
        return [next(self.responses)]


def everything(demonstrator: Demonstrator, play) -> dict[int, tuple[list[int], list[int]]]:
    """Turn -> (context, response), of all turns."""
    turns = demonstrator.turns
    demonstrator.turns = lambda play: (turns(play)[0], [replace(turn, meant=True) for turn in turns(play)[1]])
    sequences = demonstrator.acting(play)
    demonstrator.turns = turns
    return {
        row: (sequence.ids[:start], sequence.ids[start : start + size])
        for sequence in sequences
        for row, start, size in sequence.responses
    }


@pytest.mark.parametrize("env", ENVS)
def test_the_tiny_models_training_is_what_it_was(env, monkeypatch):
    tokenizer, losses = tiny_tokenizer(env), []
    demonstrator = TinyDemonstrator(tokenizer, 0, env)
    sequences = [s for game in demonstrator.script.games(4) for s in demonstrator.sequences(game)]
    shown = json.dumps([[s.ids, [[start, size] for _, start, size in s.responses]] for s in sequences])

    def recorded(*args, **options):
        losses.append(demonstration_loss(*args, **options))
        return losses[-1]

    monkeypatch.setattr(tiny.warmstart, "demonstration_loss", recorded)
    warm_start(tiny_model(len(tokenizer), seed=0, width=48), sequences, 0)
    digest, first = BEFORE[env]
    assert hashlib.sha256(shown.encode()).hexdigest()[:16] == digest
    assert [loss.item() for loss in losses[:3]] == pytest.approx(first, abs=2e-3)  # other processors round otherwise


# ---- demonstrations -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("env", ENVS)
def test_plays_alone_say_nothing_of_skills(env):
    """And there are as many of them, so that acting is learnt as well."""
    tokenizer = tiny_tokenizer(env)
    with_skills, alone = (
        [tokenizer.decode(s.ids).split() for s in made(TinyDemonstrator(tokenizer, 0, env), games=6)]
        for made in (lambda d, games: demonstrations(d, games, plays=1), plays_alone)
    )
    count = lambda texts, word: sum(word in text for text in texts)
    assert count(with_skills, "skill") >= 6 and count(with_skills, "write") == 6
    assert [count(alone, word) for word in ("skill", "hint", "skills", "write")] == [0] * 4
    assert len(alone) == len(with_skills) - 6 == 24


@pytest.mark.parametrize("template", ["chatml", "qwen3-thinking", "deepseek-r1"])
@pytest.mark.parametrize("context", ["chat", "window"])
@pytest.mark.parametrize("prompt", ["compact", "official"])
@pytest.mark.parametrize("env", ENVS)
def test_demonstrations_are_what_a_rollout_shows(env, prompt, context, template):
    tokenizer = byte_tokenizer(TEMPLATES[template])
    if prompt == "compact" and TEMPLATES[template].began:
        with pytest.raises(ValueError, match="begins every answer with <think>"):
            Demonstrator(tokenizer, 0, env, prompt=prompt)
        return
    demonstrator = Demonstrator(tokenizer, 0, env, prompt=prompt, context=context)
    scripted, encoder, slips = demonstrator.script, Encoder(tokenizer, context), 0
    for game in scripted.games(12):
        for skill in ("", "do this [and] that"):
            play = demonstrator.play(game, demonstrator.flaws(), skill=skill)
            shown = everything(demonstrator, play)
            task_type = make_env(env, prompt=prompt).reset(options={"game": game})[1]["task_type"]
            responses = Reciter([response for _, response in shown.values()])
            acting = make_env(env, prompt=prompt, max_steps=scripted.MAX_STEPS, history=HISTORY)
            acting = UnderSkill(acting, {task_type: skill} if skill else {})
            [episode], _ = rollout(responses, encoder, lambda made=acting: made, [game], 1, context_limit=10**6)
            assert [(step.context, step.response) for step in episode.steps] == list(shown.values())
            assert episode.success == play.success
            possible = [t for t, step in enumerate(episode.steps) if step.valid]
            assert len(possible) > 0.7 * len(episode.steps)
            learnt = [row for s in demonstrator.acting(play) for row, _, _ in s.responses]
            assert learnt == [t for t in possible if t not in play.slips]
            slips += len(play.slips)
    assert slips


@pytest.mark.parametrize("env", ENVS)
def test_hints_stand_before_the_turn_that_they_guide(env):
    demonstrator = Demonstrator(byte_tokenizer(TEMPLATES["chatml"]), 0, env)
    hinted = 0
    for game in demonstrator.script.games(6):
        play = demonstrator.play(game, set(), hinted=0.5)
        plain = everything(demonstrator, replace(play, hints={}))
        for t, (context, response) in everything(demonstrator, play).items():
            said = demonstrator.tokenizer.decode(context)
            assert [f" hint {text}" in said for at, text in play.hints.items() if at <= t].count(False) == 0
            assert (context == plain[t][0]) == (min(play.hints, default=99) > t)
            assert response == plain[t][1]
            hinted += t in play.hints
    assert hinted > 3


@pytest.mark.parametrize("prompt", ["compact", "official"])
@pytest.mark.parametrize("env", ENVS)
def test_hindsight_is_json_that_parses_and_a_response_ends_the_turn(env, prompt):
    tokenizer = byte_tokenizer(TEMPLATES["chatml"])
    demonstrator = Demonstrator(tokenizer, 0, env, prompt=prompt)
    for game in demonstrator.script.games(4):
        play = demonstrator.play(game, set(demonstrator.script.FLAWS))
        skills = demonstrator.script.hindsight(play)
        [sequence] = demonstrator.writing(play, skills)
        [(_, start, size)] = sequence.responses
        assert start + size == len(sequence.ids)
        assert sequence.ids[-1] == tokenizer.convert_tokens_to_ids("<|im_end|>")
        assert parse_skills(tokenizer.decode(sequence.ids[start:-1]), len(play.turns), 5) == skills


def test_official_responses_give_a_reason_first():
    for env in ENVS:
        demonstrator = Demonstrator(byte_tokenizer(TEMPLATES["chatml"]), 0, env, prompt="official")
        for game in demonstrator.script.games(4):
            play = demonstrator.play(game, set())
            for t, (_, response) in everything(demonstrator, play).items():
                text = demonstrator.tokenizer.decode(response[:-1])
                thought = re.fullmatch(r"<think>([A-Z][^<>]*\.)</think><(action|search|answer)>.+</\2>", text)
                assert thought or t in play.slips, text
                assert t in play.slips or "something else" not in thought[1]


def test_what_the_template_begins_is_not_said_again():
    template = TEMPLATES["deepseek-r1"]
    demonstrator = Demonstrator(byte_tokenizer(template), 0, prompt="official")
    play = demonstrator.play(demonstrator.script.games(1)[0], set())
    for context, response in everything(demonstrator, play).values():
        assert demonstrator.tokenizer.decode(context).endswith(template.began)
        assert re.match(r"\w[^<]*</think><action>", demonstrator.tokenizer.decode(response))


def test_an_official_shop_shows_what_the_adviser_saw():
    """Places of products depend on how many a page shows."""
    demonstrator = Demonstrator(byte_tokenizer(TEMPLATES["chatml"]), 0, "webshop", prompt="official")
    env = demonstrator.env
    for game in demonstrator.script.games(6):
        play = demonstrator.play(game, {"first hit"})
        env.reset(options={"game": game})
        for seen, command, _ in play.turns:
            assert seen in (compact.page_words(env.session), "nothing happens")
            env.step(compact.official(command, env.session))


def test_a_demonstration_ends_where_its_context_is_full():
    tokenizer = byte_tokenizer(TEMPLATES["chatml"])
    whole = Demonstrator(tokenizer, 0)
    play = whole.play(whole.script.games(1)[0], {"forget"})
    sizes = [len(context) + len(response) for context, response in everything(whole, play).values()]
    cut = everything(Demonstrator(tokenizer, 0, context_limit=sizes[2]), play)
    assert len(cut) == 3
    assert Demonstrator(tokenizer, 0, context_limit=sizes[0] - 1).acting(play) == []


# ---- training --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    """A small random model that knows the words, as a folder."""
    folder, tokenizer = tmp_path_factory.mktemp("start"), tiny_tokenizer()
    save_policy(tiny_model(len(tokenizer), seed=0, width=48), tokenizer, folder)
    return str(folder)


def weights(folder) -> torch.Tensor:
    model, _ = load_pretrained(str(folder))
    return torch.cat([parameter.flatten() for parameter in model.parameters()])


@pytest.mark.parametrize("lora_rank", [0, 4])
def test_loss_falls_and_a_stopped_cold_start_goes_on_exactly(start, tmp_path, monkeypatch, lora_rank):
    settings = ColdStart(model=start, games=12, learning_rate=0.02, lora_rank=lora_rank, batch_tokens=512)
    record = cold_start(settings, tmp_path / "whole")
    fall = 0.97 if lora_rank else 0.9  # adapters leave the random embedding as it is
    assert latest(record["losses"][-3:]) < fall * latest(record["losses"][:3])
    assert not torch.equal(weights(tmp_path / "whole"), weights(start))
    steps = 0

    def killed(*args, **options):
        nonlocal steps
        steps += 1
        if steps > 5:
            raise KeyboardInterrupt
        return demonstration_loss(*args, **options)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(tiny.coldstart, "demonstration_loss", killed)
        cold_start(settings, tmp_path / "stopped", save_every=2)
    assert torch.load(tmp_path / "stopped" / "checkpoint.pt")["losses"] == record["losses"][:4]
    again = cold_start(settings, tmp_path / "stopped", save_every=2)
    assert again["losses"] == record["losses"]
    assert torch.equal(weights(tmp_path / "stopped"), weights(tmp_path / "whole"))
    assert not (tmp_path / "stopped" / "checkpoint.pt").exists()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_saves_the_step_and_names_the_command(number, start, tmp_path, monkeypatch, capsys):
    losses = []

    def signalled(*args, **options):
        losses.append(demonstration_loss(*args, **options))
        if len(losses) == 3:
            signal.raise_signal(number)
        return losses[-1]

    monkeypatch.setattr(tiny.coldstart, "demonstration_loss", signalled)
    monkeypatch.setattr("sys.argv", ["tools/coldstart.py", "--model", start, "--games", "8"])
    before = signal.signal(number, stop)
    with pytest.raises(SystemExit) as ended:
        main(["--model", start, "--games", "8", "--out", str(tmp_path / "cold")])
    assert signal.signal(number, before) == stop
    assert ended.value.code == 128 + number
    kept = tmp_path / "cold/checkpoint.pt"
    assert torch.load(kept)["losses"] == [loss.item() for loss in losses] and len(losses) == 3
    told = f"coldstart.py: stopped by {number.name}. Last checkpoint: {kept}. Go on with: python tools/coldstart.py --m"
    assert capsys.readouterr().err.splitlines()[-1].startswith(told)


def test_a_stopped_cold_start_goes_on_with_its_own_day(start, tmp_path, monkeypatch):
    """Some templates print it: another day would make other demonstrations."""
    days, original = [], tiny.coldstart.batches_of
    monkeypatch.setattr(tiny.coldstart, "batches_of", lambda *a: (days.append(a[-1]), original(*a))[1])
    settings = ColdStart(model=start, games=1)
    write_record(tmp_path, {"settings": asdict(settings), "losses": [], "date": "2026-01-02"})
    assert cold_start(settings, tmp_path)["date"] == "2026-01-02"
    assert days == ["2026-01-02"]
    template = TEMPLATES["llama-3.2"]
    tokenizer = byte_tokenizer(template)
    demonstrator = Demonstrator(tokenizer, 0, date="2026-01-02")
    [game] = demonstrator.script.games(1)
    assert "02 Jan 2026" in tokenizer.decode(demonstrator.sequences(game)[0].ids)


def test_the_folder_is_a_plain_model(start, tmp_path):
    out = tmp_path / "cold"
    cold_start(ColdStart(model=start, games=2, lora_rank=4), out)
    model, tokenizer = AutoModelForCausalLM.from_pretrained(out), AutoTokenizer.from_pretrained(out)
    assert not any("lora" in name for name, _ in model.named_parameters())
    assert tokenizer.get_vocab() == tiny_tokenizer().get_vocab()
    assert torch.equal(torch.cat([parameter.flatten() for parameter in model.parameters()]), weights(out))


def test_another_cold_start_is_not_mixed_up_with_this_one(start, tmp_path):
    cold_start(ColdStart(model=start, games=1), tmp_path / "cold")
    with pytest.raises(ValueError, match="holds a cold start with other settings"):
        cold_start(ColdStart(model=start, games=2), tmp_path / "cold")
    with pytest.raises(ValueError, match="no demonstration fits in 4 tokens"):
        cold_start(ColdStart(model=start, games=1, context_limit=4), tmp_path / "short")
    for wrong in ({"games": 0}, {"prompt": "long"}, {"lora_rank": -1}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            ColdStart(**wrong)


def test_only_responses_are_learnt_unless_told_otherwise(start):
    model, tokenizer = load_pretrained(start)
    demonstrator = Demonstrator(tokenizer, 0)
    given = demonstrator.sequences(demonstrator.script.games(1)[0])
    sequences = [Sequence(s.ids, s.responses) for s in given]  # none that weighs more
    scored = [sequence.ids[a : a + n] for sequence in sequences for _, a, n in sequence.responses]
    by_hand, everywhere = [], []
    for sequence in sequences:
        logits = model(input_ids=torch.tensor([sequence.ids])).logits[0, :-1].log_softmax(-1)
        logprobs = logits.gather(-1, torch.tensor(sequence.ids[1:])[:, None])[:, 0]
        everywhere.append(logprobs)
        by_hand += [logprobs[a - 1 : a - 1 + n] for _, a, n in sequence.responses]
    assert torch.cat(by_hand).shape[0] == sum(map(len, scored))
    assert demonstration_loss(model, sequences, 0.0, autocast=False).item() == pytest.approx(
        -torch.cat(by_hand).mean().item()
    )
    assert demonstration_loss(model, sequences, 1.0, autocast=False).item() == pytest.approx(
        -torch.cat(everywhere).mean().item()
    )


def test_batches_hold_every_demonstration_and_their_order_is_seeded():
    demonstrator = TinyDemonstrator(tiny_tokenizer(), 0)
    sequences = [s for game in demonstrator.script.games(4) for s in demonstrator.sequences(game)]
    one, same, other = (shuffled_batches(sequences, 400, 2, seed) for seed in (1, 1, 2))
    assert one == same != other
    assert sorted(s.ids for batch in one for s in batch) == sorted(2 * [s.ids for s in sequences])


# ---- names -----------------------------------------------------------------------------------------------------------


def test_cold_models_are_made_once_and_one_that_was_stopped_goes_on(start, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "cache").symlink_to(Path(__file__).parent.parent / "cache")
    folder = folder_of(start, "alfworld")
    folder.mkdir(parents=True)
    write_record(folder, {"settings": asdict(ColdStart(model=start, games=2)), "losses": []})  # stopped at the start
    model, _ = load_model(f"cold:{start}")
    assert torch.equal(weights(folder), torch.cat([parameter.flatten() for parameter in model.parameters()]))
    assert not torch.equal(weights(folder), weights(start))
    monkeypatch.setattr(tiny.coldstart, "cold_start", lambda *args: pytest.fail("trained again"))
    load_model(f"cold:{start}")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="in one process, first"):
        load_model(f"cold:{start}", env="search")


@pytest.mark.parametrize("other", [{"model": "orgA/Model"}, {"context": "window"}, {"env": "search"}])
def test_another_models_cold_start_is_not_taken_for_this_ones(other, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = folder_of("orgB/Model", "alfworld")  # named by the last part alone
    folder.mkdir(parents=True)
    settings = asdict(ColdStart(**({"model": "orgB/Model", "games": 2} | other)))
    write_record(folder, {"settings": settings, "losses": [1.0], "seconds": 1})
    with pytest.raises(ValueError, match=f"holds a cold start of {next(iter(other))}"):
        load_model("cold:orgB/Model")


def test_a_cold_start_that_diverges_keeps_nothing(start, tmp_path):
    out = tmp_path / "cold"
    with pytest.raises(FloatingPointError, match="the loss is nan"):
        cold_start(ColdStart(model=start, games=12, learning_rate=1e30, batch_tokens=512), out)
    assert [path.name for path in out.glob("[!.]*")] == ["coldstart.json"]
    assert "seconds" not in json.loads((out / "coldstart.json").read_text())
    model, _ = load_pretrained(start)
    model.lm_head.weight.data[0, 0] = float("inf")  # as a last step may leave it
    with pytest.raises(FloatingPointError, match="is not finite: nothing is written"):
        save_checkpoint(out / "checkpoint.pt", model, torch.optim.AdamW(model.parameters()), [], 0.0)
    assert not (out / "checkpoint.pt").exists()
    with pytest.raises(ValueError, match="save_every must be positive"):
        cold_start(ColdStart(model=start, games=1), tmp_path / "never", save_every=0)


def test_window_prompts_show_as_many_steps_as_a_run_does():
    assert Config().history == HISTORY == Demonstrator(byte_tokenizer(TEMPLATES["chatml"]), 0, "webshop").env.history


def test_cold_models_speak_compact_prompts():
    for changes in ({"prompt": "official", "max_new_tokens": 64}, {"context": "window"}):
        with pytest.raises(ValueError, match="for others run"):
            laptop(model="cold:smollm2", **changes)
    recipe = Config.from_recipe("laptop-smollm2")
    assert (recipe.model, recipe.prompt, recipe.context) == ("cold:smollm2", "compact", "chat")


def test_the_laptop_recipe_holds_the_longest_demonstration(smollm2):
    config = Config.from_recipe("laptop-smollm2")
    demonstrator = Demonstrator(smollm2[1], 0, config.env)
    for game in demonstrator.script.games(100):
        *acting, writing = demonstrator.sequences(game)
        assert max(size for s in acting for _, _, size in s.responses) <= config.max_new_tokens
        assert writing.responses[0][2] <= config.skill_tokens
        assert len(writing.ids) <= config.context_limit


def test_weights_are_named_by_what_they_depend_on(monkeypatch):
    words = tiny_tokenizer()
    key = key_of("alfworld", words)
    assert key == key_of("alfworld", words)
    for module, name, value in (
        (tiny.warmstart, "LEARNING_RATE", 1e-3),
        (tiny.warmstart, "optimizers", latest),  # any other code
        (script("alfworld"), "SLIP", 0.5),
        (script("alfworld"), "PLAYS", 4),
        (script("alfworld"), "JUDGED", 1),
        (script("alfworld"), "JUDGED_FIRST", 1),
        (tiny.demonstrations, "FOREIGN", 0.1),
        (tiny.warmstart, "DECISIVE", 1.0),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(module, name, value)
            assert key_of("alfworld", words) != key, name


# ---- what is said at the end -----------------------------------------------------------------------------------------


def test_share_of_right_skills_by_object_place_and_order():
    names = {"object": {"pen", "cup"}, "place": {"desk", "shelf", "drawer"}}
    known = [
        "for pen first look in drawer or shelf then take pen then move pen to desk",
        "for pen never stop find pen",
    ]

    def right(text: str) -> list[bool]:
        return list(agreement(text, known, names).values())

    assert right(known[0]) == right(known[1]) == [True, True, True, True]
    assert right(known[0].replace("drawer or shelf", "desk")) == [True, True, True, True]  # a guess, and no matter
    assert right(known[0].replace("pen", "cup")) == [False, True, True, False]
    assert right(known[0].replace("to desk", "to shelf")) == [True, False, True, False]
    assert right(known[0].replace("then take", "and take")) == [True, True, False, False]


def test_the_command_prints_losses_success_and_skills(start, tmp_path, capsys):
    command = ["--model", start, "--games", "2", "--out", str(tmp_path / "cold"), "--eval-games", "2"]
    main(command)
    said = capsys.readouterr().out
    assert "loss " in said and "valid_unseen" in said and "of the episode skills right: object" in said
    main([*command[:-1], "0"])
    assert "valid_seen" not in capsys.readouterr().out
    with pytest.raises(SystemExit, match="other settings"):
        main([*command, "--seed", "1"])


def test_words_that_a_model_cannot_learn_are_told(start, tmp_path, capsys):
    cold_start(ColdStart(model=start, env="search", games=1), tmp_path)
    assert re.search(r"WARNING: \d+% of the responses' tokens are unknown to --model", capsys.readouterr().out)


def test_the_novice_of_a_cold_start_is_seeded():
    tokenizer = byte_tokenizer(TEMPLATES["chatml"])
    one, same, other = (Demonstrator(tokenizer, seed) for seed in (0, 0, 1))
    game = one.script.games(1)[0]
    assert one.sequences(game) == same.sequences(game) != other.sequences(game)
