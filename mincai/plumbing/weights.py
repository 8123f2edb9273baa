"""GPT-2's published weights by name: found on this machine, or else fetched once and checked.

    python -m mincai.plumbing.weights gpt2      find or fetch, verify, and say where they are

`resolve` is asked wherever a model is named: a folder is taken as it is, one of four names becomes
a folder. Fetching is the only thing in mincai that opens a connection for weights. huggingface_hub
does it where it is installed (it resumes, and keeps its own cache), torch.hub where it is not. Left
out on purpose: any other model's name. Those can be given as folders, which checkpoint.py checks.
"""

import contextlib
import dataclasses
import os
import sys
import tempfile
import textwrap
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from mincai import DATA, UserError
from mincai.model import GPTConfig
from mincai.plumbing import data, memory
from mincai.plumbing.checkpoint import load, read_config
from mincai.plumbing.cli import arg, run
from mincai.plumbing.output import sha256
from mincai.plumbing.tokenizer import load_tokenizer

SHAPES: dict[str, GPTConfig] = {  # Radford et al. 2019, table 2
    "gpt2": GPTConfig(n_layer=12, n_head=12, n_embd=768),
    "gpt2-medium": GPTConfig(n_layer=24, n_head=16, n_embd=1024),
    "gpt2-large": GPTConfig(n_layer=36, n_head=20, n_embd=1280),
    "gpt2-xl": GPTConfig(n_layer=48, n_head=25, n_embd=1600),
}
NAMES = ", ".join(SHAPES)
# Bytes and SHA-256 of model.safetensors, where we know them; of the others we know the shapes only
PUBLISHED = {
    "gpt2": (548_105_171, "248dfc3911869ec493c76e65bf2fcf7f615828b0254c12b473182f0f81d3a707")
}
# The small one first: no connection is noticed at once
FILES = ("config.json", "model.safetensors")
OWNER = "openai-community"
WEIGHTS = DATA / "weights"


@dataclass(frozen=True)
class Config:
    FIRST = "model"  # also given without its flag
    model: str = arg("gpt2", f"{NAMES}, or a model's folder")


def resolve(model: str) -> Path:
    """A folder's path as it is, or the folder of a published GPT-2, fetched if there is none yet.

    Looked through in this order: data/weights, the Hugging Face cache, the network. What is found
    is not checked, so a file that a person has put there may differ from the published one; what is
    fetched is. UserError for any other string, a failed fetch, and a first edition's tiny world.
    """
    if os.path.isdir(model):
        data.refuse_first_edition(model)
        return Path(model)
    if model not in SHAPES:
        told = f"no such folder, and not one of {NAMES}; check the path or the name"
        raise UserError(f"{model}: {told}")
    for folder in (WEIGHTS / model, *_snapshots(model)):
        # a link to a file that is gone counts as none
        if all((folder / file).is_file() for file in FILES):
            return folder
    return _fetch(model)


def _snapshots(name):
    """Folders of huggingface_hub's cache that may hold the model; the library may be absent."""
    user = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    home = os.environ.get("HF_HOME") or os.path.join(user, "huggingface")
    cache = Path(os.environ.get("HF_HUB_CACHE") or os.path.join(home, "hub")).expanduser()
    # the second was fetched before the model had an owner
    for repository in (f"models--{OWNER}--{name}", f"models--{name}"):
        yield from sorted((cache / repository / "snapshots").glob("*"))


def _url(name, file):
    return f"https://huggingface.co/{OWNER}/{name}/resolve/main/{file}"


def _fetch(name):
    """Fetch both files -> their folder. UserError, one line, whatever goes wrong on the way."""
    try:
        from huggingface_hub import hf_hub_download  # here, because nothing else needs it
    except ImportError:
        hf_hub_download = None
    size = f"{4 * memory.parameters(SHAPES[name]) / 1e9:.1f} GB"
    source = f"https://huggingface.co/{OWNER}/{name}"
    print(f"{name}: not on this machine; fetching about {size} from {source}", file=sys.stderr)
    try:
        if hf_hub_download is None:
            return _download(name)
        folder = [Path(hf_hub_download(f"{OWNER}/{name}", file)) for file in FILES][-1].parent
        check(name, folder)
        return folder
    except UserError:
        raise
    except Exception as error:  # both libraries let their HTTP library's errors through
        reason = textwrap.shorten(f"{type(error).__name__}: {error}", 200)  # on one line
        pages = " and ".join(_url(name, file) for file in FILES)
        put = f"open {pages} in a browser and put the two files in {WEIGHTS / name}/"
        told = f"could not be fetched ({reason}); {put}, or give a folder that holds them"
        raise UserError(f"{name} {told} in place of the name") from None


def _download(name):
    """Without huggingface_hub: into WEIGHTS/name, whole and checked or not at all."""
    target = WEIGHTS / name
    for path in (target / file for file in FILES):
        if path.is_symlink() and not path.exists():
            raise UserError(f"{path}: is a link that leads nowhere; mend it, or remove it")
    WEIGHTS.mkdir(parents=True, exist_ok=True)
    try:
        # A folder of its own: several GPUs' processes may all find the weights missing
        with tempfile.TemporaryDirectory(".partial", f"{name}.", WEIGHTS) as partial:
            for file in FILES:
                torch.hub.download_url_to_file(_url(name, file), os.path.join(partial, file))
            check(name, partial, "it has been removed, try again")
            target.mkdir(exist_ok=True)
            for file in FILES:
                if not (target / file).exists():  # half a model, put there by hand, is completed
                    os.replace(os.path.join(partial, file), target / file)
    finally:
        with contextlib.suppress(OSError):  # it stays unless it is empty
            WEIGHTS.rmdir()
    return target


def check(name: str, folder, advice="remove it and get it again") -> None:
    """UserError unless folder holds the published config.json and model.safetensors of `name`;
    names and shapes of the tensors are left to checkpoint.load. advice: what to do about it."""
    config, weights = (Path(folder, file) for file in FILES)
    found = dataclasses.asdict(read_config(folder))
    for key, value in dataclasses.asdict(SHAPES[name]).items():
        if found[key] != value:
            told = f"{key} is {found[key]}, but {name} has {value}"
            raise UserError(f"{config}: {told}; {advice}")
    if name in PUBLISHED:
        found = {"bytes": weights.stat().st_size, "as SHA-256": sha256(weights)}
        for (unit, has), known in zip(found.items(), PUBLISHED[name]):
            if has != known:
                told = f"has {has} {unit}, but {name}'s has {known}"
                raise UserError(f"{weights}: {told}; {advice}")
    try:
        # torch.hub takes a broken connection for the end; the header says how long the file must be
        with safe_open(weights, "pt"):
            pass
    except (SafetensorError, OSError) as error:
        raise UserError(f"{weights}: cannot be read as safetensors ({error}); {advice}") from None


def check_vocabulary(model_config: GPTConfig, tokenizer, folder) -> None:
    """UserError when the tokenizer can give an id that the model has no embedding for. More rows
    than tokens are fine: some models round their number up."""
    tokens, rows = tokenizer.n_vocab, model_config.vocab_size
    if tokens > rows:
        told = f"the vocabulary has {tokens} tokens, the embedding only {rows} rows"
        own = "the model's own vocabulary (tokenizer.json)"
        raise UserError(f"{folder}: {told}; put {own} beside its weights")


def common_tokenizer(*folders):
    """The vocabulary that the models in these folders share and have rows for, else UserError."""
    first = load_tokenizer(folders[0])
    for folder in folders:
        other = load_tokenizer(folder)
        if (other.ranks, other.control, other.eot) != (first.ranks, first.control, first.eot):
            told = f"has another vocabulary than {folders[0]}; take models made from the same base"
            raise UserError(f"{folder} {told}")
        check_vocabulary(read_config(folder), first, folder)
    return first


def main(cfg: Config) -> None:
    folder = resolve(cfg.model)
    published = not os.path.isdir(cfg.model)
    if published:
        check(cfg.model, folder)
    parameters = sum(p.numel() for p in load(folder).parameters())
    size = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    verified = ", SHA-256 as published" if published and cfg.model in PUBLISHED else ""
    print(f"{folder}: {parameters:,} parameters, {size:,} bytes{verified}")


if __name__ == "__main__":
    run(main, Config, __doc__)
