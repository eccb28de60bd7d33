"""What every program here does around its work: flags, errors in one line, and loading with care."""

import argparse
import ctypes
import errno
import json
import os
import signal
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import MISSING, fields
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal, NoReturn, get_args, get_origin

import torch
import torch.distributed as dist
import transformers
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from records import InputError

# ------------------------------------------------------------------------------------------------------------
# The command line


class HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """Shows a description as it is written, and the defaults of flags that have one."""

    def _get_help_string(self, action: argparse.Action) -> str:
        none = isinstance(action.default, bool) or action.default in (None, "", argparse.SUPPRESS)
        return action.help + ("" if none else f" (default: {action.default})")


def refuse(message: str) -> NoReturn:
    """Stands in for argparse's `error`, which would print the whole usage too."""
    raise InputError(f"{message} (see --help)")


def parse_config(
    config: type, recipes: dict[str, dict[str, Any]], usage: str, doc: str, argv: list[str]
) -> Any:
    """Flags to a dataclass of flags; a recipe sets defaults, and a flag that is given wins over it.

    A field's metadata has its `help`. One that is on is switched off by --no_NAME.
    """
    parser = argparse.ArgumentParser(usage=usage, description=doc, formatter_class=HelpFormatter)
    parser.error = refuse
    for entry in fields(config):
        value = {"required": True} if entry.default is MISSING else {"default": entry.default}
        value |= entry.metadata
        if entry.type is bool:
            prefix, value["action"] = ("no_", "store_false") if entry.default else ("", "store_true")
            parser.add_argument(f"--{prefix}{entry.name}", dest=entry.name, **value)
        elif get_origin(entry.type) is Literal:
            parser.add_argument(f"--{entry.name}", choices=get_args(entry.type), **value)
        else:
            kind = next(iter(get_args(entry.type)), entry.type)  # float of float | None
            parser.add_argument(f"--{entry.name}", type=kind, metavar=kind.__name__.upper(), **value)
    parser.set_defaults(**recipes[parser.parse_known_args(argv)[0].recipe])
    return config(**vars(parser.parse_args(argv)))


LEAST = {"max_length": 2, "max_prompt_length": 2, "num_generations": 2} | dict.fromkeys(
    ("batch_size", "eval_every", "items", "keep_checkpoints", "max_bad_steps", "max_new_tokens", "queries",
     "replicate", "replies"), 1)  # fmt: skip


def check_ranges(config: Any) -> None:
    """Raises InputError for a number of the flags that is not finite, or below 0 or its least value."""
    numbers = ((name, n) for name, v in vars(config).items() for n in (v if type(v) is list else [v]))
    for name, value in numbers:
        least = LEAST.get(name, 0)
        if type(value) is int and not least <= value < 2**32:  # the limit is numpy's, of a seed
            raise InputError(f"--{name} {value}: must be {least} or more, and less than 2**32")
        if type(value) is float and not least <= value < 1e38:  # float32's
            raise InputError(f"--{name} {value}: must be a finite number of {least} or more")


def check_config(config: Any) -> None:
    """Raises InputError for settings of clha.py that can't be, before anything is loaded."""
    check_ranges(config)
    for folder in filter(None, (config.output_dir, config.token_cache)):
        check_out(folder, "folder")
    if config.max_prompt_length >= config.max_length:
        raise InputError(f"--max_prompt_length {config.max_prompt_length}: must be less than --max_length")
    if dist.get_world_size() % config.replicate:
        raise InputError(f"--replicate {config.replicate}: must divide the {dist.get_world_size()} processes")


def check_out(out: str | Path, kind: Literal["new", "file", "folder"]) -> None:
    """Raises InputError, before the work, where its output can't be put; a "new" one must not be there."""
    out = Path(out)
    if above := next((path for path in out.parents if path.is_file()), None):
        raise InputError(f"{out}: {above} is a file; nothing can be put below it")
    if kind == "new" and out.exists():
        raise InputError(f"{out}: exists already; choose another --out")
    if kind == "file" and out.is_dir():
        raise InputError(f"{out}: is a folder; it must be a file")
    if kind == "folder" and out.is_file():
        raise InputError(f"{out}: is a file; it must be a folder")


def read_json(path: str | Path, need: dict[str, type], what: str) -> dict[str, Any]:
    """An object from a JSON file. Raises InputError where it lacks what it needs, {name: type}."""
    try:
        value = json.loads(Path(path).read_text(encoding="utf-8"))
        json.dumps(value, ensure_ascii=False).encode()  # half a character can't be written anywhere
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path}: not readable as JSON ({error})") from None
    if not isinstance(value, dict) or not all(isinstance(value.get(name), need[name]) for name in need):
        raise InputError(f"{path}: not {what}, with {', '.join(need)}")
    return value


def rendezvous() -> dict[str, Any]:
    """Where the processes of `init_process_group` find each other: a group of one, or torchrun's.

    On one machine torchrun keeps its store when it restarts the processes, and they would find the addresses
    of the dead (pytorch/pytorch#135712); so each start has keys of its own. (With several machines, whose
    restarts are not counted together, TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 in torchrun's environment helps.)
    """
    get = os.environ.get
    if "RANK" not in os.environ:
        return {"store": dist.HashStore(), "rank": 0, "world_size": 1}
    if "TORCHELASTIC_RUN_ID" in os.environ and sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG: if torchrun is killed, save and end
    if get("TORCHELASTIC_USE_AGENT_STORE") != "True" or get("LOCAL_WORLD_SIZE") != get("WORLD_SIZE"):
        return {}
    store = dist.TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False)
    store = dist.PrefixStore(f"start {get('TORCHELASTIC_RESTART_COUNT')}", store)
    return {"store": store, "rank": int(os.environ["RANK"]), "world_size": int(os.environ["WORLD_SIZE"])}


def init_process() -> tuple[int, int, torch.device]:
    """Joins the processes that torchrun started, or makes a group of one: (rank, processes, device)."""
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    if not dist.is_initialized():
        hour = timedelta(hours=1)  # others wait for the first one, which reads the model, and tokenises
        dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo", timeout=hour, **rendezvous())
    return dist.get_rank(), dist.get_world_size(), device


def make_deterministic() -> None:
    """Only operations that give the same bits again, also on a GPU; raises where torch has none."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    torch.backends.cuda.enable_mem_efficient_sdp(False)  # its gradient adds up in any order


def run(main: Callable[[], None]) -> None:
    """Runs a program; wrong input ends in one line and exit code 2."""
    if not sys.stderr.isatty():
        transformers.utils.logging.disable_progress_bar()  # as ours do
    try:
        main()
    except InputError as error:
        stop(str(error))
    except OSError as error:  # no file of that name can be made, the disk is full, ...
        if error.filename is None and error.errno != errno.ENOSPC:
            raise
        stop(f"{error.filename or 'a file'}: {error.strerror}")
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def stop(message: str) -> NoReturn:
    """Ends the program with a line. Of several processes that say the same, the first one says it."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_DFL)
    if os.environ.get("RANK", "0") != "0":
        time.sleep(3)  # the others are ended by torchrun meanwhile, if the first one stops too
    print(f"{Path(sys.argv[0]).name}: {' '.join(message.splitlines())}", file=sys.stderr)
    sys.exit(2)


def describe(model: PreTrainedModel, data: Any, steps: int, config: Any, fill_to: int) -> str:
    """What clha.py is about to do, in five lines."""
    import clha

    parameters = sum(p.numel() for p in model.parameters())
    processes, queries, examples = dist.get_world_size(), len(data), data.outlines()
    shards = processes // config.replicate
    target = torch.tensor([e["chosen"] for e in examples]) if config.sft_target == "chosen" else None
    rewards = clha.reply_matrix(examples)
    keep, gate = clha.rescore(rewards, config.min_reward_gap if config.rescore else None, target)
    kept = keep.sum() / clha.rescore(rewards, None)[0].sum()
    cut = sum(example["cut"] > 0 for example in examples) / queries
    of_clha = f", margin {config.margin:g}, reduction {config.reduction}" * (config.objective == "clha")
    return (
        f"model   {parameters / 1e6:,.1f} M parameters; weights, gradients and AdamW: "
        f"{16 * parameters / shards / 2**30:.2f} GiB on each of {processes} process(es)\n"
        f"data    {queries:,} queries of {sum(data.sizes) / queries:.0f} tokens; "
        f"in {cut:.1%} the prompt or a reply is cut\n"
        f"rescore {kept:.1%} of pairs kept, {1 - gate.float().mean():.1%} of queries gated (not imitated)\n"
        f"loss    {config.objective}, alpha {config.alpha:g}{of_clha}\n"
        f"train   {steps:,} steps of {config.batch_size} queries, learning rate {config.learning_rate:g}; "
        f"packs of {fill_to or config.pack_tokens:,} tokens{', flex' if fill_to else ' at most, sdpa'}"
    )


# ------------------------------------------------------------------------------------------------------------
# Loading


SAYS = {  # what some errors of transformers and torch mean, by a word in them
    "trust_remote_code": "needs code of its own, and no folder's code is run here",
    "ignore_mismatched_sizes": "its weights have other shapes than its config.json says",
    "weights_only": "its weights are a pickle that may hold code, and is not opened; safetensors would be",
}


@contextmanager
def loading(path: str) -> Iterator[None]:
    """Around what loads from a folder or a hub name: raises InputError if there is no model to be had."""
    if not Path(path).is_dir():
        if path.count("/") != 1 or path[0] in "./~" or Path(path).exists():
            raise InputError(f"{path}: no such model folder, and not a hub name like owner/name")
        print(f"{path}: no such folder here, so it is taken from the Hugging Face hub", file=sys.stderr)
    elif not (Path(path) / "config.json").is_file():
        raise InputError(f"{path}: not a Hugging Face model folder (no config.json in it)")
    # Of a bare tokenizer.model, transformers 5 makes a tokenizer with other merges, and says nothing.
    if (Path(path) / "tokenizer.model").is_file() and not (Path(path) / "tokenizer.json").is_file():
        raise InputError(f"{path}: tokenizer.model alone gives wrong ids; it needs a tokenizer.json")
    verbosity = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()  # what is missing is said here, in one line
    try:
        yield
    except InputError:
        raise
    except Exception as error:  # of all kinds, for a file that is not as it should be
        said = textwrap.shorten(f"can't be loaded: {type(error).__name__}: {error}", 300)
        meaning = next((text for word, text in SAYS.items() if word in str(error)), said)
        raise InputError(f"{path}: {meaning}") from error
    finally:
        transformers.logging.set_verbosity(verbosity)


def refuse_missing(path: str, info: dict[str, Any]) -> None:
    """Raises InputError if a folder lacks weights, by what loading it told; transformers would draw them."""
    if info["missing_keys"]:
        raise InputError(f"{path}: has no weights for {', '.join(sorted(info['missing_keys'])[:3])} ...")


def refuse_vocabulary(path: str, tokenizer: PreTrainedTokenizerBase, config: PretrainedConfig) -> None:
    """Raises InputError if a tokenizer has tokens that the model of the folder does not know."""
    known = getattr(config.get_text_config(), "vocab_size", tokenizer.vocab_size)
    if tokenizer.vocab_size > known:  # without added tokens, which a text may never have
        raise InputError(f"{path}: the tokenizer has {tokenizer.vocab_size} tokens, the model {known}")


def load_tokenizer(path: str) -> PreTrainedTokenizerBase:
    """The tokenizer of a model folder. Raises InputError if it has no EOS, or is LLaMA's and goes wrong."""
    with loading(path):
        tokenizer = transformers.AutoTokenizer.from_pretrained(path, trust_remote_code=False)
    if tokenizer.eos_token_id is None:
        raise InputError(f"{path}: the tokenizer has no EOS token, so that no reply could end")
    if "llama" in type(tokenizer).__name__.lower() and tokenizer("a").input_ids[0] != tokenizer.bos_token_id:
        raise InputError(f"{path}: the LLaMA tokenizer drops BOS; the folder needs a right tokenizer.json")
    with loading(path):
        config = transformers.AutoConfig.from_pretrained(path, trust_remote_code=False)
    refuse_vocabulary(path, tokenizer, config)
    return tokenizer
