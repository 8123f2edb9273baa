"""GPT-2's published weights by name: found on this machine, or else fetched once and checked.

    python -m mincai.plumbing.weights gpt2      find or fetch, verify, and say where they are

`resolve` is asked wherever a model is named: a folder is taken as it is, one of four names becomes a folder.
Fetching is the only thing in mincai that opens a connection for weights. huggingface_hub does it where it is
installed (it resumes, and keeps its own cache), torch.hub where it is not. What is left out on purpose: any
other model's name. A folder can be given for those, and checkpoint.py says whether it is a GPT-2.
"""

import contextlib
import dataclasses
import hashlib
import os
import sys
import tempfile
import textwrap
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from mincai import UserError, constitution
from mincai.plumbing import data
from mincai.plumbing.checkpoint import load, read_config
from mincai.plumbing.cli import arg, run
from mincai.model import GPTConfig
from mincai.plumbing.tokenizer import load_tokenizer

SHAPES: dict[str, GPTConfig] = {  # Radford et al. 2019, table 2
    "gpt2": GPTConfig(n_layer=12, n_head=12, n_embd=768),
    "gpt2-medium": GPTConfig(n_layer=24, n_head=16, n_embd=1024),
    "gpt2-large": GPTConfig(n_layer=36, n_head=20, n_embd=1280),
    "gpt2-xl": GPTConfig(n_layer=48, n_head=25, n_embd=1600),
}
# The paper's table has other numbers (117M to 1542M); its authors have corrected them since
PARAMETERS = {"gpt2": 124_439_808, "gpt2-medium": 354_823_168, "gpt2-large": 774_030_080,
              "gpt2-xl": 1_557_611_200}
# Bytes and SHA-256 of model.safetensors, where we know them; the others are held against their shapes only
PUBLISHED = {"gpt2": (548_105_171, "248dfc3911869ec493c76e65bf2fcf7f615828b0254c12b473182f0f81d3a707")}
FILES = ("config.json", "model.safetensors")  # the small one first: no connection is noticed at once
OWNER = "openai-community"
URL = "https://huggingface.co/" + OWNER + "/{name}/resolve/main/{file}"
WEIGHTS = constitution.PATH.parent / "weights"


@dataclass(frozen=True)
class Config:
    model: str = arg("gpt2", f"{', '.join(SHAPES)}, or a model's folder; also given without the flag")


# --- finding ------------------------------------------------------------------------------------------------

def resolve(model: str) -> Path:
    """A folder's path as it is, or the folder of a published GPT-2, fetched if this machine has none.

    Looked through in this order: data/weights, the Hugging Face cache, the network. What is found is not
    checked, so a file that a person has put there may differ from the published one; what is fetched is.
    UserError for any other string, when fetching fails, and for a tiny world of the first edition.
    """
    if os.path.isdir(model):
        data.refuse_first_edition(model)
        return Path(model)
    if model not in SHAPES:
        raise UserError(f"{model}: no such folder, and not one of {', '.join(SHAPES)}; check the path or the name")
    for folder in (WEIGHTS / model, *_snapshots(model)):
        if all((folder / file).is_file() for file in FILES):  # a link to a file that is gone counts as none
            return folder
    return _fetch(model)


def _snapshots(name):
    """Folders of huggingface_hub's cache that may hold the model, whether or not the library is installed."""
    env = os.environ
    home = env.get("HF_HOME") or os.path.join(env.get("XDG_CACHE_HOME") or "~/.cache", "huggingface")
    cache = Path(env.get("HF_HUB_CACHE") or os.path.join(home, "hub")).expanduser()
    for repo in (f"models--{OWNER}--{name}", f"models--{name}"):  # the second: fetched before it had an owner
        yield from sorted((cache / repo / "snapshots").glob("*"))


# --- fetching -----------------------------------------------------------------------------------------------

def _fetch(name):
    """Fetch both files -> their folder. UserError, one line, whatever goes wrong on the way."""
    try:
        from huggingface_hub import hf_hub_download  # here, because nothing else needs it
    except ImportError:
        hf_hub_download = None
    print(f"{name}: not on this machine; fetching about {4 * PARAMETERS[name] / 1e9:.1f} GB from "
          f"https://huggingface.co/{OWNER}/{name}", file=sys.stderr, flush=True)
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
        raise UserError(f"{name} could not be fetched ({reason}); open "
                        f"{' and '.join(URL.format(name=name, file=file) for file in FILES)} in a browser and put the "
                        f"two files in {WEIGHTS / name}/, or give a folder that holds them in place of the "
                        f"name") from None


def _download(name):
    """Without huggingface_hub: into WEIGHTS/name, whole and checked or not at all."""
    target = WEIGHTS / name
    for path in (target / file for file in FILES):
        if path.is_symlink() and not path.exists():
            raise UserError(f"{path}: is a link that leads nowhere; mend it, or remove it")
    WEIGHTS.mkdir(parents=True, exist_ok=True)
    try:
        # A folder of its own for each process: several GPUs' processes may all find the weights missing
        with tempfile.TemporaryDirectory(prefix=f"{name}.", suffix=".partial", dir=WEIGHTS) as partial:
            for file in FILES:
                torch.hub.download_url_to_file(URL.format(name=name, file=file), os.path.join(partial, file))
            check(name, partial, "it has been removed, try again")
            target.mkdir(exist_ok=True)
            for file in FILES:
                if not (target / file).exists():  # half a model, put there by hand, is completed
                    os.replace(os.path.join(partial, file), target / file)
    finally:
        with contextlib.suppress(OSError):  # it stays unless it is empty
            WEIGHTS.rmdir()
    return target


# --- checking -----------------------------------------------------------------------------------------------

def check(name: str, folder, advice="remove it and get it again") -> None:
    """UserError unless folder holds the published config.json and model.safetensors of `name`.

    Names and shapes of the tensors are left to checkpoint.load. advice: what the message says to do.
    """
    folder = Path(folder)
    found, expected = (dataclasses.asdict(config) for config in (read_config(folder), SHAPES[name]))
    for key in expected:
        if found[key] != expected[key]:
            raise UserError(f"{folder / FILES[0]}: {key} is {found[key]}, but {name} has {expected[key]}; {advice}")
    path = folder / FILES[1]
    size, digest = PUBLISHED.get(name, (None, None))
    for known, measure, unit in ((size, _size, "bytes"), (digest, _sha256, "as SHA-256")):
        if known is not None and (measured := measure(path)) != known:
            raise UserError(f"{path}: has {measured} {unit}, but {name}'s has {known}; {advice}")
    try:  # torch.hub takes a broken connection for the end of the file; the header says how long it must be
        with safe_open(path, "pt"):
            pass
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path}: cannot be read as safetensors ({error}); {advice}") from None


def _size(path):
    return path.stat().st_size


def _sha256(path):
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def check_vocabulary(model_config: GPTConfig, tokenizer, folder) -> None:
    """UserError when the tokenizer can give an id that the model has no embedding for. More rows than tokens
    are fine: some models round their number up."""
    if tokenizer.n_vocab > model_config.vocab_size:
        raise UserError(f"{folder}: the vocabulary has {tokenizer.n_vocab} tokens, the embedding only "
                        f"{model_config.vocab_size} rows; put the model's own tokenizer.tiktoken beside its weights")


def common_tokenizer(*folders):
    """The vocabulary that the models in these folders share; UserError where it differs, or is more than a model has
    rows for."""
    first = load_tokenizer(folders[0])
    for folder in folders:
        if load_tokenizer(folder).ranks != first.ranks:
            raise UserError(f"{folder} has another vocabulary than {folders[0]}; take models made from the same base")
        check_vocabulary(read_config(folder), first, folder)
    return first


def main(cfg: Config) -> None:
    folder = resolve(cfg.model)
    published = not os.path.isdir(cfg.model)
    if published:
        check(cfg.model, folder)
    parameters = sum(p.numel() for p in load(folder).parameters())
    size = sum(_size(path) for path in folder.glob("*.safetensors"))
    verified = ", SHA-256 as published" if published and cfg.model in PUBLISHED else ""
    print(f"{folder}: {parameters:,} parameters, {size:,} bytes{verified}")


if __name__ == "__main__":
    if len(sys.argv) > 1 and not sys.argv[1].startswith("-"):  # `mincai.plumbing.weights gpt2` is `--model gpt2`
        sys.argv.insert(1, "--model")
    run(main, Config, __doc__)
