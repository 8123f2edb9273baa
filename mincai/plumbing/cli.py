"""From one flat frozen dataclass to a command line, and back to one instance of it.

Every script states its settings once, as the fields of a `Config`. A field is a flag: its name, its
type, its default, its bounds and its help text are read from the dataclass, so nothing is declared
that does not exist. What is left out on purpose: config files, nesting, abbreviated flags. A
misspelt flag exits 2.

    @dataclass(frozen=True)
    class Config:
        lr: float = arg(1e-4, "learning rate of Adam", least=0)    # --lr 3e-4
        kinds: tuple[str, ...] = arg(("sft",), "which")            # --kinds sft,ppo
        again: bool = arg(False, "make the output anew")           # --again / --no-again

The field that a Config names in FIRST may be given without its flag, as the first argument.
"""

import argparse
import dataclasses
import errno
import math
import os
import signal
import sys
import threading

import torch
from tqdm import tqdm

from mincai import UserError
from mincai.plumbing import memory, workers

# A disk without room, or that takes no more
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS)


MOST = 10**18  # torch takes no seed of more than 64 bits


def arg(default, help, least=-math.inf, most=math.inf, choices=()):
    """A dataclass field that carries its own help text, and what values it may have."""
    told = dict(help=help, least=least, most=most, choices=choices)
    return dataclasses.field(default=default, metadata=told)


def check(cfg) -> None:
    """UserError for a value outside the bounds or the choices of its field."""
    for field in dataclasses.fields(cfg):
        value, told = getattr(cfg, field.name), field.metadata
        flag, choices = f"--{field.name.replace('_', '-')}", told.get("choices")
        if choices and value not in choices:
            raise UserError(f"{flag} {value}: choose {', '.join(choices[:-1])} or {choices[-1]}")
        least, most = told.get("least", -math.inf), told.get("most", math.inf)
        if isinstance(value, (int, float)) and not least <= value <= most:  # a NaN is neither
            asked = f"from {least} to {most}" if most < math.inf else f"of {least} or more"
            asked = "above 0" if 0 < least < 1 else asked
            raise UserError(f"{flag} {value}: give a number {asked}")
        if type(value) is int and abs(value) > MOST:
            raise UserError(f"{flag} {value}: give a number nearer to 0, of 18 digits at most")


def parse(Config, argv=None, description=""):
    """The command line (default: sys.argv) as a `Config`; exits 2 on an unknown or a bad flag."""
    how = dict(allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser = argparse.ArgumentParser(description=description, **how)
    own = vars(Config).get("__annotations__", {})  # before those that it inherits
    for field in sorted(dataclasses.fields(Config), key=lambda field: field.name not in own):
        _add_flag(parser, field)
    argv = list(sys.argv[1:] if argv is None else argv)
    first = getattr(Config, "FIRST", None)
    if first and argv and not argv[0].startswith("-"):
        argv.insert(0, "--" + first)
    cfg = Config(**vars(parser.parse_args(argv)))
    try:
        check(cfg)
    except UserError as error:
        parser.error(f"argument {error}")
    return cfg


def _names(text):
    return tuple(part.strip() for part in text.split(",") if part.strip())


# A field's type -> what argparse is to make of it
FLAGS = {kind: dict(type=kind, metavar=kind.__name__.upper()) for kind in (int, float, str)}
FLAGS[bool] = dict(action=argparse.BooleanOptionalAction)
FLAGS[tuple[str, ...]] = dict(type=_names, metavar="STR,..")


def _add_flag(parser, field):
    if field.type not in FLAGS:
        raise TypeError(f"{field.name}: a flag cannot be made of {field.type}")
    flag = "--" + field.name.replace("_", "-")
    if field.type is bool and flag.startswith("--no-"):
        raise TypeError(f"{field.name}: argparse takes {flag} for the opposite of another flag")
    # a flag that is not given is absent from the namespace: defaults live in the dataclass alone
    common = dict(dest=field.name, default=argparse.SUPPRESS)
    action = parser.add_argument(flag, **common, **FLAGS[field.type])
    # set afterwards, because BooleanOptionalAction appends the default once more on Python < 3.13
    default, choices = field.default, " | ".join(field.metadata.get("choices", ()))
    default = ",".join(map(str, default)) if isinstance(default, tuple) else str(default)
    told = f"{field.metadata.get('help', '')}{choices and ': ' + choices}"
    action.help = f"{told} (default: {default or 'none'})".strip().replace("%", "%%")


def run(main, Config, description="", argv=None):
    """What stands under `if __name__ == "__main__"`: read the flags, call main(cfg), exit.

    A UserError is one line on stderr and its exit code, never a traceback, and so is a GPU without
    memory. Ctrl-C, SIGTERM and SIGHUP are a line too, and 128 + their number. Who reads only the
    head of what is printed gets no traceback after it.
    """

    def end(number, frame):
        raise KeyboardInterrupt(number)

    for name in ("SIGTERM", "SIGHUP"):  # the latter is not everywhere
        if hasattr(signal, name) and threading.current_thread() is threading.main_thread():
            signal.signal(getattr(signal, name), end)
    try:
        main(parse(Config, argv, description))
        sys.stdout.flush()
    except (UserError, torch.cuda.OutOfMemoryError) as error:  # torch.cuda: for torch 2.4
        told = error if isinstance(error, UserError) else memory.shortage(error)
        tqdm.write(f"mincai: error: {told}", file=sys.stderr)  # below any progress bar
        sys.exit(getattr(error, "code", 2))
    except KeyboardInterrupt as stopped:
        number = stopped.args[0] if stopped.args else 0
        told = f"ended by {signal.Signals(number).name}" if number else "interrupted"
        print(f"\nmincai: {told}; what is done is kept, the same command goes on", file=sys.stderr)
        sys.exit(128 + (number or signal.SIGINT))
    except BrokenPipeError:
        _close_stdout()
        sys.exit(128 + signal.SIGPIPE)
    except OSError as error:
        if error.errno not in FULL:
            raise
        what = error.filename or "what is printed, or a temporary file,"
        tqdm.write(f"mincai: error: {what} cannot be written ({error.strerror})", file=sys.stderr)
        _close_stdout()
        sys.exit(2)


def _close_stdout():
    """Else Python writes what is left to it at exit."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def precision(device, dtype):
    """A context for the matrix products: float32 as they are, bfloat16 by autocast. Weights stay in
    float32, and so do logits (model.py) and log-softmaxes (losses.py). Let none outlive an
    optimiser step: autocast makes its 16-bit copies of the weights once a context.

    Beside bfloat16, a GPU may round what goes into float32 products to 11 bits (TF32), from here
    on: they are several times faster, and the trunk's own rounding is the larger one.
    """
    kind, half = torch.device(device).type, dtype == "bfloat16"
    if kind == "cuda":
        torch.set_float32_matmul_precision("high" if half else "highest")
    return torch.autocast(kind, torch.bfloat16, enabled=half)


def set_threads(n):
    """Let the work use n CPU cores and return how many; 0 chooses, eight at most.

    How they are used goes by the model, see workers.py; what comes of a small model's work does not
    depend on their number. OMP_NUM_THREADS, where a person has set it, lowers the choice.
    """
    if n == 0:
        allowed = getattr(os, "sched_getaffinity", lambda _: range(os.cpu_count() or 1))
        wish, cores = os.environ.get("OMP_NUM_THREADS", ""), len(allowed(0))
        n = max(1, min(8, cores, int(wish) if wish.isdigit() else cores))
    workers.use(n)
    return n


def pick_device(name):
    """'auto', 'cpu' or 'cuda' to 'cpu' or 'cuda'."""
    found = torch.cuda.is_available()
    if name == "cuda" and not found:
        told = "PyTorch sees no GPU; use --device cpu or a CUDA build of torch"
        raise UserError(f"--device cuda: {told}")
    return "cuda" if found and name != "cpu" else "cpu"
