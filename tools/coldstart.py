"""Cold start of any model for one environment: supervised training on scripted episodes, then success and skills.

python tools/coldstart.py --model smollm2 --env alfworld --games 150 --out runs/cold

--demonstrations takes a run's own episodes (tools/export.py) in place of scripted ones.

The same command goes on where a stopped one was; of a finished one it only measures again. --out is then a model:
train.py --model runs/cold (docs/coldstart.md).
"""

from __future__ import annotations

import argparse
import shlex
import signal
import sys
from dataclasses import fields
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
import lm  # isort: skip

import torch

from config import Config, flag
from data import Trajectory
from evaluate import columns_of, environment, evaluate, format_table
from lm.encoder import Encoder
from lm.loading import load_pretrained
from lm.precision import device_of
from lm.writers import model_writer
from memory.machine import peak_mib
from skills import write_skills
from tiny.coldstart import CHECKPOINT, ColdStart, cold_start, folder_of
from tiny.plays import script
from tiny.supervised import SHOWN, latest
from tools.skill_quality import share_right

RESPONSE = {"compact": 24, "official": 96}  # most tokens of an action: the scripts' longest have 15 and 41
SKILL_TOKENS = 160  # of an answer with skills: the scripts' longest has 92


def measured(model, tokenizer, settings: ColdStart, games: int, date: str | None = None) -> str:
    """Held-out success, and how often the skills that the model writes of these episodes are right."""
    config = Config.from_recipe(
        "laptop",
        model=settings.model,
        env=settings.env,
        prompt=settings.prompt,
        context=settings.context,
        context_limit=settings.context_limit,
        max_steps=script(settings.env).MAX_STEPS,
        max_new_tokens=RESPONSE[settings.prompt],
        mixed_precision=settings.mixed_precision,
        eval_games=games,
    )
    model.to(device_of()).eval()
    encoder = Encoder(tokenizer, config.context, date)
    results = evaluate(model, encoder, config)
    played = [trajectory for split in results.values() for trajectory in split]
    with torch.autocast(model.device.type, torch.bfloat16, enabled=config.mixed_precision == "bf16"):
        return f"{format_table(results, columns_of(config))}\n{skills_of(played, model, encoder, config)}"


def skills_of(trajectories: list[Trajectory], model, encoder: Encoder, config: Config) -> str:
    write = model_writer(
        model,
        encoder,
        max_new_tokens=SKILL_TOKENS,
        temperature=1.0,
        context_limit=config.context_limit,
        prefill="",
        rollout_budget=config.rollout_budget,
    )
    torch.manual_seed(0)
    template = environment(config)().analysis_prompt()
    skills, metrics = write_skills(trajectories, write, max_step_skills=config.max_step_skills, template=template)
    right = share_right(trajectories, skills, script(config.env), config.prompt)
    return f"skills: {100 * metrics['skills/first_parse_rate']:.0f}% parse; of the episode skills right: {right}"


def stop(number: int, frame) -> None:
    """Handles SIGTERM and SIGHUP: they end a cold start as Ctrl-C does."""
    raise KeyboardInterrupt(signal.Signals(number).name)


def number_of(error: KeyboardInterrupt) -> int:
    return signal.Signals[str(error) or "SIGINT"]


def left_by(error: KeyboardInterrupt, out: Path | None) -> str:
    """What ended the command, what it leaves, and what goes on with it."""
    kept = out and next((out / name for name in (CHECKPOINT, "model.safetensors") if (out / name).exists()), None)
    again = shlex.join(["python", *sys.argv])
    return f"stopped by {str(error) or 'Ctrl-C'}. Last checkpoint: {kept or 'none'}. Go on with: {again}"


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for f in fields(ColdStart):
        parser.add_argument(
            flag(f.name),
            type=type(f.default),
            default=f.default,
            help=f"{f.metadata['help']} (default: {f.default})",
            choices=f.metadata["choices"],
        )
    parser.add_argument("--out", type=Path, help="folder of the model (default: runs/cold-MODEL-ENV)")
    parser.add_argument("--save-every", type=int, default=50, help="steps between checkpoints (default: 50)")
    parser.add_argument("--eval-games", type=int, default=40, help="games per held-out split; 0: none (default: 40)")
    args = vars(parser.parse_args(argv))
    out, save_every, games = (args.pop(name) for name in ("out", "save_every", "eval_games"))
    try:
        with lm.one_line("coldstart.py"):
            settings = ColdStart(**args)
            if settings.demonstrations and out is None:  # or cold:MODEL would load it
                raise ValueError("--demonstrations needs --out: the default folder is for scripted episodes")
            out = out or folder_of(settings.model, settings.env, settings.prompt)
            record = cold_start(settings, out, save_every)
            model, tokenizer = load_pretrained(str(out))
        show(record, model, tokenizer, settings, games)
    except FloatingPointError as error:
        sys.exit(f"coldstart.py: {error}")
    except KeyboardInterrupt as error:
        print(f"coldstart.py: {left_by(error, out)}", file=sys.stderr)
        sys.exit(128 + number_of(error))


def show(record: dict, model, tokenizer, settings: ColdStart, games: int) -> None:
    first, last = record["losses"][:SHOWN], latest(record["losses"])
    trained_on = device_of()
    print(f"{len(record['losses'])} steps in {record['seconds']} s, peak memory {peak_mib(trained_on):.0f} MiB")
    print(f"loss {first[0]:.2f} at first, {last:.3f} in the end (mean of the last {SHOWN} steps), nats a token")
    if games:
        print(measured(model, tokenizer, settings, games, record.get("date")))


if __name__ == "__main__":
    for name in {"SIGTERM", "SIGHUP"} & set(dir(signal)):
        if signal.getsignal(getattr(signal, name)) is not signal.SIG_IGN:  # as nohup has it
            signal.signal(getattr(signal, name), stop)
    main()
