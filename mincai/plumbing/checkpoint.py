"""Weights on disk in Hugging Face's GPT-2 layout: config.json and model.safetensors in one folder.

`save` writes what `transformers.GPT2LMHeadModel.from_pretrained` opens; `load` opens what that library
saves. The one difference in the weights: GPT-2 was written with Conv1D layers, whose matrices are [in,
out], the transpose of nn.Linear's. Only safetensors are read, because unpickling a downloaded file runs
whatever code is in it.
"""

import json
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from mincai import UserError
from mincai.plumbing import output
from mincai.model import GPT, GPTConfig, ScalarModel

# What every training stage writes into a checkpoint's folder; GPT-2's own vocabulary needs no file
FILES = ("config.json", "model.safetensors", "run.json", "metrics.jsonl", "tokenizer.tiktoken")
CONV1D = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")  # [in, out]
BUFFERS = (".attn.bias", ".attn.masked_bias")  # the causal mask, which older files store with the weights
UNTIED = "lm_head.weight"  # the output's own matrix, where it is not the token embedding
HEAD = ("score.weight", "score.bias", "gain", "shift")  # of ScalarModel; on disk score.gain and score.shift
SPECIAL = ("bos_token_id", "eos_token_id")  # in config.json for other libraries to read
NEEDED = ("vocab_size", "n_positions", "n_embd", "n_layer", "n_head")  # positive integers in config.json
FIXED = {"activation_function": "gelu_new", "scale_attn_weights": True,
         "scale_attn_by_inverse_layer_idx": False, "reorder_and_upcast_attn": False,
         "add_cross_attention": False}  # what model.py is; a file that leaves one out means this value


# --- saving -------------------------------------------------------------------------------------------------

def save(model: GPT | ScalarModel, folder, extra: dict = {}, work=None) -> None:
    """Write the model as a checkpoint folder, whole or not at all. Of an older checkpoint that is
    there, what mincai wrote is replaced, and everything else stays.

    extra: file name -> bytes, str, or an object for JSON, written beside the weights; the keys
    bos_token_id and eos_token_id (int) go into config.json instead. run.json says in any case that
    mincai wrote this, and which files. work: where output.begin has begun this checkpoint, if files
    are there already that belong to it. UserError where the folder is not mincai's to write to.
    """
    files = {k: v for k, v in extra.items() if k != "run.json"}
    stamp = extra.get("run.json", {})
    work = work or output.begin(folder, {"config.json", "model.safetensors", *files} - {*SPECIAL})
    write(model, work, files)
    output.finish(work, folder, json.loads(stamp) if isinstance(stamp, (bytes, str)) else stamp)


def write(model: GPT | ScalarModel, folder, extra: dict = {}) -> None:
    """The same files, one after the other, into a folder that is only being put together."""
    folder, special = Path(folder), {k: extra[k] for k in SPECIAL if k in extra}
    files = {k: v for k, v in extra.items() if k not in special}
    assert not {"config.json", "model.safetensors"} & set(files), sorted(files)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        save_file(_to_file(model), folder / "model.safetensors", metadata={"format": "pt"})
        for name, content in {"config.json": _hf_config(model) | special, **files}.items():
            if not isinstance(content, (bytes, str)):
                content = json.dumps(content, indent=2) + "\n"
            if isinstance(content, str):
                content = content.encode("utf-8")
            (folder / name).write_bytes(content)
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"{folder}: cannot be written ({reason}); give another --out") from None


def _to_file(model):
    """State dict to the names and layout of the file; contiguous copies, which safetensors asks for."""
    gpt = model.gpt if isinstance(model, ScalarModel) else model
    tensors = {k if k == UNTIED else "transformer." + k: v.T if k.endswith(CONV1D) else v
               for k, v in gpt.state_dict().items()}
    if isinstance(model, ScalarModel):
        state = model.state_dict()
        tensors |= {"score." + k.removeprefix("score."): state[k] for k in HEAD if k in state}
    return {k: v.detach().cpu().contiguous() for k, v in tensors.items()}


def _hf_config(model):
    gpt = model.gpt if isinstance(model, ScalarModel) else model
    c = gpt.config
    return {"architectures": ["GPT2LMHeadModel"], "model_type": "gpt2", "vocab_size": c.vocab_size,
            "n_positions": c.block_size, "n_ctx": c.block_size, "n_embd": c.n_embd, "n_layer": c.n_layer,
            "n_head": c.n_head, "layer_norm_epsilon": c.layer_norm_epsilon, "activation_function": "gelu_new",
            "tie_word_embeddings": c.tied, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0,
            "torch_dtype": str(gpt.wte.weight.dtype).removeprefix("torch.")}


# --- loading ------------------------------------------------------------------------------------------------

def load(folder, device="cpu", scalar=False) -> GPT | ScalarModel:
    """Open a checkpoint folder, in float32: a GPT, or with scalar=True a ScalarModel.

    scalar=True on a language model's folder starts a fresh head, drawn from torch's global random numbers.
    Raises UserError for anything that is not exactly a GPT-2 of the shape its config.json states.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; check the path, or run the stage that writes it")
    config = read_config(folder)
    tensors = _read_weights(folder)
    if "score.likelihood" in tensors:
        raise UserError(f"{folder}: a preference model of an earlier mincai, whose score was a mean over "
                        f"tokens and a likelihood; train it anew (train_pm.py --again)")
    head = {k: tensors.pop("score." + k.removeprefix("score.")) for k in HEAD
            if "score." + k.removeprefix("score.") in tensors}
    if head and not scalar:
        raise UserError(f"{folder}: is a preference model (it has a score head); give a language model")
    tensors = {k.removeprefix("transformer."): v for k, v in tensors.items()}
    tensors = {k: v for k, v in tensors.items() if not k.endswith(BUFFERS)}
    lm_head = tensors.pop(UNTIED, None) if config.tied else None
    if lm_head is not None and "wte.weight" in tensors and not torch.equal(lm_head, tensors["wte.weight"]):
        raise UserError(f"{folder}: {UNTIED} differs from wte.weight, but config.json does not say "
                        f'"tie_word_embeddings": false; get both files of one model')
    with torch.device("meta"):  # shapes only: no memory, and no random numbers drawn to be overwritten
        model = GPT(config)
    _fill(model, tensors, CONV1D, folder)
    if scalar:
        model = ScalarModel(model)
        if head:
            trunk = {"gpt." + k: v for k, v in model.gpt.state_dict().items()}
            _fill(model, trunk | head, (), folder)
    return model.to(device)


def _fill(model, tensors, transposed, folder):
    """Put tensors, in the file's layout, into the model, after checking every name and shape."""
    expected = {k: tuple(v.shape)[::-1] if k.endswith(transposed) else tuple(v.shape)
                for k, v in model.state_dict().items()}
    for problem, names in (("is missing", expected.keys() - tensors.keys()),
                           ("does not belong to a GPT-2", tensors.keys() - expected.keys())):
        if names:
            raise UserError(f"{folder}: weight {min(names)} {problem} ({len(names)} such); "
                            f"get the model.safetensors and config.json of one model")
    for name, shape in expected.items():
        if tuple(tensors[name].shape) != shape:
            raise UserError(f"{folder}: weight {name} has shape {tuple(tensors[name].shape)}, but "
                            f"config.json asks for {shape}; get both files of one model")
    state = {k: (v.T if k.endswith(transposed) else v).float().contiguous() for k, v in tensors.items()}
    model.load_state_dict(state, assign=True)


def _read_json(path):
    try:
        content = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; a checkpoint folder holds config.json and "
                        f"model.safetensors") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    except ValueError:  # JSON's and UTF-8's errors
        raise UserError(f"{path}: not JSON; get the file again") from None
    if not isinstance(content, dict):
        raise UserError(f"{path}: not a JSON object; get the file again")
    return content


def read_config(folder) -> GPTConfig:
    """config.json of a checkpoint folder; UserError for any other architecture than GPT-2's."""
    path = Path(folder) / "config.json"
    c = _read_json(path)
    if c.get("model_type") != "gpt2":
        raise UserError(f"{path}: model_type is {c.get('model_type')!r}; only 'gpt2' can be loaded")
    for key in NEEDED:
        if key not in c:
            raise UserError(f"{path}: {key} is missing; get the config.json of a GPT-2")
        if type(c[key]) is not int or c[key] < 1:
            raise UserError(f"{path}: {key} is {c[key]!r}; it must be a whole number above 0")
    for key, value in FIXED.items():
        if c.get(key, value) != value:
            raise UserError(f"{path}: {key} is {c[key]!r}; only {value!r} can be loaded")
    tied = c.get("tie_word_embeddings", True)
    if type(tied) is not bool:
        raise UserError(f"{path}: tie_word_embeddings is {tied!r}; it must be true or false")
    if c.get("n_inner") not in (None, 4 * c["n_embd"]):
        raise UserError(f"{path}: n_inner is {c['n_inner']!r}; only 4 * n_embd can be loaded")
    if c["n_embd"] % c["n_head"]:
        raise UserError(f"{path}: n_embd {c['n_embd']} is not a multiple of n_head {c['n_head']}")
    epsilon = c.get("layer_norm_epsilon", 1e-5)
    if type(epsilon) not in (int, float) or not epsilon > 0:
        raise UserError(f"{path}: layer_norm_epsilon is {epsilon!r}; it must be a number above 0")
    return GPTConfig(c["vocab_size"], c["n_positions"], c["n_layer"], c["n_head"], c["n_embd"], epsilon, tied)


def _read_weights(folder):
    """All tensors of the folder: from model.safetensors, or from the shards that
    model.safetensors.index.json names."""
    index = folder / "model.safetensors.index.json"
    shards = ["model.safetensors"]
    if not (folder / shards[0]).exists() and index.exists():
        names = _read_json(index).get("weight_map")
        if not isinstance(names, dict) or not names or not all(isinstance(v, str) for v in names.values()):
            raise UserError(f"{index}: has no weight_map of names to files; get the file again")
        shards = sorted(set(names.values()))
        for shard in shards:
            if Path(shard).name != shard or not shard.endswith(".safetensors"):  # stays inside the folder
                raise UserError(f"{index}: names {shard!r}; only .safetensors files beside it are read")
    tensors = {}
    for shard in shards:
        path = folder / shard
        try:
            tensors |= load_file(path)
        except FileNotFoundError:
            raise UserError(f"{path}: no such file; weights are read from safetensors only, never from "
                            f"pickled .bin or .pt files") from None
        except (SafetensorError, OSError) as error:
            raise UserError(f"{path}: cannot be read as safetensors ({error}); get the file again") from None
    return tensors
