"""Everything that a GPU may change, in eight minutes and one log: make gpu-check

Needs no network: models are random. In this order: the tests that run on the device; three iterations of a Qwen3-1.7B
that knows nothing, through its recipe in bfloat16, with the measured peak beside the plan; cached beside fresh
sampling; packed beside per-step scoring; decoding beside plain `generate`; seconds beside the plan; others at a small
size. Without a GPU all of it runs on the CPU at tiny sizes, so that nothing but the device is new there.

The log goes to lab/logs/gpu_check.txt, without a GPU to lab/logs/gpu_check_cpu.txt. A part that fails or takes too
long is named there, and the others go on; the exit status says whether all went well.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent.parent))

import torch
from transformers import AutoModelForCausalLM

from lm.loading import save_policy
from memory.plan import architecture_of
from runlog.metrics import read_lines
from tiny.warmstart import tiny_tokenizer

ROOT = Path(__file__).parent.parent.parent
RECIPE, SHAPE = "alfworld-qwen3-1.7b", "Qwen3-1.7B"
SMALLER = {  # on a CPU: the same shape, in little
    "num_hidden_layers": 2,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 2000,
    "layer_types": ["full_attention"] * 2,
}
# what the recipe's run is cut down to: random weights never end a response
CUT = "--iterations 3 --max-steps 3 --eval-every 0 --eval-games 2 --save-every 3 --env-options data=generate "
ON_GPU = CUT + "--tasks 4 --rollouts 4 --max-new-tokens 128 --skill-tokens 128"
ON_CPU = CUT + "--tasks 2 --rollouts 2 --max-new-tokens 24 --skill-tokens 8 --context-limit 1024 --token-budget 4096"


def parts(gpu: bool, model: str, out: str) -> list[tuple[str, str, int]]:
    """(title, command after `python`, seconds that it may take)."""
    sized = f"--model {model if gpu else 'random'}"
    run = f"--recipe {RECIPE} --model {model} --out {out} {ON_GPU if gpu else ON_CPU}"
    small = "--turns 2 4 --repeats 1"
    return [
        ("tests on the device", "-m pytest -q tests/test_gpu.py", 120),
        ("the plan of the run below", f"train.py {run} --plan", 60),
        ("three iterations through the recipe", f"train.py {run}", 240),
        ("cached beside fresh sampling", f"lab/benchmarks/rollout.py {sized} {small}", 60),
        ("packed beside per-step scoring", f"lab/benchmarks/score.py {sized} {small} --skills 0 2", 60),
        ("noise of two scorings", "lab/benchmarks/noise.py --model random --turns 3", 60),
        ("OPID beside GRPO", "lab/benchmarks/iteration.py --model random --repeats 1 -- --tasks 2 --rollouts 2", 90),
        (
            "a step of decoding, plain and ours",
            f"lab/benchmarks/decoding.py {STEPS_ON_GPU if gpu else STEPS_ON_CPU}",
            120,
        ),
        ("seconds, by plan and taken", "lab/benchmarks/plan.py --hours tiny", 90),
    ]


STEPS_ON_GPU = f"--model {SHAPE} --precision autocast bfloat16 --rows 16 64 128 --context 1000 2500 --rounds 1"
STEPS_ON_GPU += " --bandwidth 4800"  # an H200's, for the limit
STEPS_ON_CPU = "--model random --rows 2 --context 20 --steps 2 --rounds 1"


def make_model(folder: Path, gpu: bool) -> None:
    """A random model of the recipe's architecture, with a tokenizer that is here: the model's own is on the hub."""
    architecture = architecture_of(SHAPE)
    for name, value in ({} if gpu else SMALLER).items():
        setattr(architecture, name, value)
    torch.manual_seed(0)
    with torch.device("cuda" if gpu else "cpu"):
        model = AutoModelForCausalLM.from_config(architecture, dtype=torch.float32)
    save_policy(model.to("cpu"), tiny_tokenizer(), folder)


def run_part(title: str, command: str, limit: int, log) -> bool:
    """Run one command, its output printed and logged. -> whether it ended well and in time."""
    started = time.perf_counter()
    try:
        done = subprocess.run(
            [sys.executable, *command.split()], cwd=ROOT, capture_output=True, text=True, timeout=limit
        )
        said, problem = (
            done.stdout,
            "" if done.returncode == 0 else f"FAILED ({done.returncode})\n{done.stderr[-2000:]}",
        )
    except subprocess.TimeoutExpired as error:
        said, problem = (error.stdout or b"").decode(), f"FAILED: not done after {limit} s"
    seconds = time.perf_counter() - started
    text = f"\n== {title}, {seconds:.0f} s\n$ python {command}\n{said}{problem}"
    print(text, flush=True)
    log.write(text.rstrip() + "\n")
    log.flush()
    return not problem


def peaks(out: Path) -> str:
    records = read_lines(out / "metrics.jsonl") if (out / "metrics.jsonl").exists() else []
    measured = max((record.get("memory/peak_mib", 0) for record in records), default=0)
    return f"measured peak of the three iterations: {measured:.0f} MiB (the plan stands above)"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--log", type=Path, help="where the log goes")
    args = parser.parse_args()
    gpu = torch.cuda.is_available()
    path = args.log or ROOT / "lab/logs" / ("gpu_check.txt" if gpu else "gpu_check_cpu.txt")
    device = torch.cuda.get_device_name() if gpu else "no GPU: tiny sizes on the CPU"
    folder = Path(tempfile.mkdtemp())
    started, failed = time.perf_counter(), []
    with open(path, "w") as log:
        log.write(f"$ make gpu-check\n{device}; torch {torch.__version__}, CUDA {torch.version.cuda}\n")
        make_model(folder / "model", gpu)
        for title, command, limit in parts(gpu, str(folder / "model"), str(folder / "run")):
            if not run_part(title, command, limit, log):
                failed.append(title)
            if title.startswith("three"):
                log.write(peaks(folder / "run") + "\n")
        seconds = time.perf_counter() - started
        end = f"\n{seconds:.0f} s in all; {'all went well' if not failed else 'FAILED: ' + ', '.join(failed)}"
        log.write(end + "\n")
    print(end, f"\nlog: {path}")
    shutil.rmtree(folder)
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()
