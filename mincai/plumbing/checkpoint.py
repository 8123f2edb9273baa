"""Weights on disk in Hugging Face's GPT-2 layout: config.json and model.safetensors in one folder.

`save` writes what `transformers.GPT2LMHeadModel.from_pretrained` opens; `load` opens what that
library saves. The one difference in the weights: GPT-2 was written with Conv1D layers, whose
matrices are [in, out], the transpose of nn.Linear's. Only safetensors are read, because unpickling
a downloaded file runs whatever code is in it.
"""

import dataclasses
import json
import math
import os
import re
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch.overrides import TorchFunctionMode

from mincai import UserError
from mincai.model import GPT, GPTConfig, ScalarModel
from mincai.plumbing import data, lock, output, tokenizer, workers

# A model on disk, with its vocabulary for us and for other libraries; words.txt is there for a
# small one only
MODEL = ("config.json", "model.safetensors", *tokenizer.FILES)
FILES = (*MODEL, "run.json", "metrics.jsonl")  # what every training stage may write into its folder
# In these weights, [in, out] in the file
CONV1D = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")
BUFFERS = (".attn.bias", ".attn.masked_bias")  # the causal mask, which older files hold as well
UNTIED = "lm_head.weight"  # the output's own matrix, where it is not the token embedding
# ScalarModel's own, by their names in a file
HEAD = {f"score.{name}": name for name in ("gain", "shift")}
HEAD |= {name: name for name in ("score.weight", "score.bias")}
OWN = "mincai."  # in front of a tensor's name where that name holds what others read
# In config.json for other libraries, whose heads read the last token that is not padding
SPECIAL = ("bos_token_id", "eos_token_id", "pad_token_id")
# GPTConfig's fields in their order, as config.json calls them
SIZES = ("vocab_size", "n_positions", "n_layer", "n_head", "n_embd")
KEYS = (*SIZES, "layer_norm_epsilon", "tie_word_embeddings")
MOST = 10**7  # any size, and any weight but a head's: what is larger overflows on the way
LAYERS = 200  # to put many more together takes minutes
FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
BOTH = "get the model.safetensors and config.json of one model"
# What model.py is; a file that leaves one out means the first value. Both names of the tanh GELU
# mean one formula
FIXED = {
    "activation_function": ("gelu_new", "gelu_pytorch_tanh"),
    "scale_attn_weights": (True,),
    "scale_attn_by_inverse_layer_idx": (False,),
    "reorder_and_upcast_attn": (False,),
    "add_cross_attention": (False,),
}
# How names of weights begin where a wrapper was saved: which attribute of it is the model
WRAPPED = {
    "_orig_mod.": "_orig_mod",  # torch.compile
    "module.": "module",  # DataParallel and DistributedDataParallel
    "pretrained_model.": "pretrained_model",  # a value head over it
    "v_head.": "pretrained_model",  # the same, as TRL saves it
    "base_model.model.": "merge_and_unload()",  # under an adapter of PEFT's
}


def save(model: GPT | ScalarModel, folder, extra: dict | None = None) -> None:
    """Write the model as a checkpoint folder, whole or not at all. Of an older checkpoint that is
    there, what mincai wrote is replaced, and everything else stays.

    extra: file name -> bytes or str, written beside the weights; the keys of SPECIAL (int) go into
    config.json instead. "run.json", a dict, says in any case that mincai wrote this, and which
    files. UserError where the folder is not mincai's to write to.
    """
    files = dict(extra or {})
    stamp = files.pop("run.json", {})
    scalar = isinstance(model, ScalarModel)
    gpt = model.gpt if scalar else model
    config = _hf_config(gpt, scalar) | {key: files.pop(key) for key in SPECIAL if key in files}
    files["config.json"] = json.dumps(config, indent=2) + "\n"
    # safetensors asks for contiguous copies
    tensors = {k: v.detach().cpu().contiguous() for k, v in _to_file(model, gpt).items()}

    def write(work):
        save_file(tensors, work / "model.safetensors", metadata={"format": "pt"})
        mask = os.umask(0)  # safetensors 0.8 writes for its owner alone, whatever the umask
        os.umask(mask)
        os.chmod(work / "model.safetensors", 0o666 & ~mask)

    with lock.alone(folder):
        work = output.begin(folder, {"model.safetensors", *files})
        output.fill(work, files, write)
        output.finish(work, folder, stamp)


def _to_file(model, gpt):
    """State dict to the names and layout of the file."""
    tensors = {}
    for name, x in gpt.state_dict().items():
        tensors[name if name == UNTIED else f"transformer.{name}"] = _turn(name, x)
    if isinstance(model, ScalarModel):
        state = model.state_dict()
        tensors |= {in_file: state[name] for in_file, name in HEAD.items()}
        tensors |= _folded(tensors)
    return tensors


def _folded(tensors):
    """A preference model's score for GPT2ForSequenceClassification, which knows no bias, gain or
    shift: what it reads, and beside it what `load` puts back in its place.

    gain * (w.h + bias) + shift is (gain * w).(h + c * w / |w|^2) with c = bias + shift / gain, and
    the last LayerNorm's bias is added to h.
    """
    names = ("score.weight", "score.bias", "score.gain", "score.shift", "transformer.ln_f.bias")
    w, bias, gain, shift, last = (tensors[name].double() for name in names)
    moved = last + ((bias + shift / gain) * w / w.square().sum()).squeeze(0)
    if not moved.isfinite().all():  # a head of zeros: every answer scores the same
        return {}
    found = {"score.weight": gain * w, "transformer.ln_f.bias": moved}
    own = {OWN + name: tensors[name] for name in found}
    return own | {name: x.to(tensors[name].dtype) for name, x in found.items()}


def _turn(name, x):
    """A weight from nn.Linear's layout to the file's, or back."""
    return x.T if name.endswith(CONV1D) else x


def _hf_config(gpt, scalar):
    one = {"id2label": {"0": "score"}, "label2id": {"score": 0}}  # num_labels is 1
    return {
        "architectures": ["GPT2ForSequenceClassification" if scalar else "GPT2LMHeadModel"],
        **(one if scalar else {}),
        "model_type": "gpt2",
        **dict(zip(KEYS, dataclasses.astuple(gpt.config), strict=True)),
        "n_ctx": gpt.config.block_size,
        "activation_function": "gelu_new",
        **dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0),
        "torch_dtype": str(gpt.wte.weight.dtype).removeprefix("torch."),
    }


def load(folder, device="cpu", scalar=False, new_head=False) -> GPT | ScalarModel:
    """Open a checkpoint folder, in float32: a GPT, or with scalar=True a ScalarModel.

    new_head: a language model's folder may be given for the latter; its head is drawn from torch's
    global random numbers. UserError for anything that is not exactly a GPT-2 of the shape in its
    config.json, and for weights that are no finite numbers.

    Rows of the embedding beyond the folder's vocabulary (some models round their number up, some
    have added tokens that nothing names) are kept, but get no logits: nobody could read their ids.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; check the path, or run the stage that makes it")
    if (folder / "adapter_config.json").exists() and not (folder / "config.json").exists():
        told = "is an adapter without the model it belongs to"
        raise UserError(f"{folder}: {told}; save the two merged (PEFT's merge_and_unload)")
    config, tensors = output.steady(folder, lambda: (_config(folder), _read_weights(folder)))
    for name in [name for name in tensors if name.startswith(OWN)]:  # see _folded
        tensors[name.removeprefix(OWN)] = tensors.pop(name)
    for prefix, inner in WRAPPED.items():
        if any(name.startswith(prefix) for name in tensors):
            told = f"weights are named {prefix}*, as a wrapper around a model is saved"
            raise UserError(f"{folder}: {told}; save the model inside it, its .{inner}")
    head = {HEAD[name]: tensors.pop(name) for name in HEAD if name in tensors}
    told = None
    if head.keys() == {"score.weight"}:
        told = "is another library's reward model (score.weight, but no bias, gain and shift)"
    elif head and not scalar:
        told = "is a preference model (it has a head)"
    elif scalar and not head and not new_head:
        told = "is a language model, without a preference model's head"
    if told:
        wanted = "what train_pm.py has made" if scalar and not new_head else "a language model"
        raise UserError(f"{folder}: {told}; give {wanted}")
    tensors = {k.removeprefix("transformer."): v for k, v in tensors.items()}
    tensors = {k: _turn(k, v) for k, v in tensors.items() if not k.endswith(BUFFERS)}
    lm_head = tensors.pop(UNTIED, None) if config.tied else None
    # Of the two names of one matrix safetensors' save_model keeps only one
    if lm_head is not None and not torch.equal(lm_head, tensors.setdefault("wte.weight", lm_head)):
        told = f'{UNTIED} differs from wte.weight, but "tie_word_embeddings" is not false'
        advice = "write false there if the model has learnt a head of its own, else " + BOTH
        raise UserError(f"{folder / 'config.json'}: {told}; {advice}")
    with torch.device("meta"), Undrawn():  # shapes only: no memory
        model = GPT(config)
    _fill(model, tensors, folder)
    model.tokens = min(config.vocab_size, tokenizer.tokens_in(folder))
    if scalar:
        model = ScalarModel(model)
        if head:
            trunk = {f"gpt.{k}": v for k, v in model.gpt.state_dict().items()}
            _fill(model, trunk | head, folder)
    model = model.to(device)
    workers.fit(model.gpt if scalar else model)
    return model


class Undrawn(TorchFunctionMode):
    """Leaves out what torch.nn.init does: no random numbers are drawn to be overwritten, and no
    compiler is imported to draw shapes, which takes longer than reading a small model."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        drawn = getattr(function, "__module__", "") == "torch.nn.init"
        return None if drawn else function(*args, **(kwargs or {}))


def _fill(model, tensors, folder):
    """Put tensors into the model, after checking every name and shape."""
    expected = model.state_dict()
    odd = expected.keys() ^ tensors.keys()
    if odd:
        problem = "is missing" if min(odd) in expected else "does not belong to a GPT-2"
        raise UserError(f"{folder}: weight {min(odd)} {problem} ({len(odd)} differ); {BOTH}")
    copies = {}
    for name, x in tensors.items():
        found, wanted = (tuple(_turn(name, y).shape) for y in (x, expected[name]))
        if found != wanted:  # as they lie in the file
            told = f"weight {name} has shape {found}, but config.json asks for {wanted}"
            raise UserError(f"{folder}: {told}; {BOTH}")
        if x.dtype not in FLOATS:
            told = f"weight {name} is of {x.dtype}".replace("torch.", "")
            raise UserError(f"{folder}: {told}; only floating-point weights can be loaded")
        # a copy: what is read stays mapped to the file, which somebody may write over
        copies[name] = weight = x.float().clone(memory_format=torch.contiguous_format)
        low, high = map(float, weight.aminmax())  # NaN if one of them is
        most = math.inf if name in HEAD.values() else MOST
        if not -most < low <= high < most:
            finite = math.isfinite(low) and math.isfinite(high)
            what = f"{max(low, high, key=abs):.3g}" if finite else "NaN or infinity"
            told = f"weight {name} holds {what}; get the file again"
            raise UserError(f"{folder}: {told}, or look at the run that made it")
    model.load_state_dict(copies, assign=True)


def read_config(folder) -> GPTConfig:
    """config.json of a checkpoint folder; UserError for any other architecture than GPT-2's."""
    return output.steady(folder, lambda: _config(folder))


def _config(folder):
    path = Path(folder) / "config.json"
    content = data.read_object(path, "a checkpoint folder holds config.json and model.safetensors")
    c = {"tie_word_embeddings": True, "layer_norm_epsilon": 1e-5, **content}

    def need(key, right, wanted):
        if not right:
            found = repr(c[key]) if key in c else "missing"
            raise UserError(f"{path}: {key} is {found}; {wanted}")

    need("model_type", c.get("model_type") == "gpt2", "only 'gpt2' can be loaded")
    for key in SIZES:
        most = LAYERS if key == "n_layer" else MOST
        whole = type(c.get(key)) is int and 0 < c[key] <= most
        need(key, whole, f"it must be a whole number above 0, and at most {most:,}")
    for key, values in FIXED.items():
        need(key, c.get(key, values[0]) in values, f"only {values[0]!r} can be loaded")
    need("n_inner", c.get("n_inner") in (None, 4 * c["n_embd"]), "only 4 * n_embd can be loaded")
    need("n_embd", c["n_embd"] % c["n_head"] == 0, f"it must be a multiple of n_head {c['n_head']}")
    need("tie_word_embeddings", type(c["tie_word_embeddings"]) is bool, "it must be true or false")
    epsilon = c["layer_norm_epsilon"]
    small = type(epsilon) is float and 0 < epsilon < 1
    need("layer_norm_epsilon", small, "it must be a number above 0 and below 1")
    return GPTConfig(*(c[key] for key in KEYS))


def _read_weights(folder):
    """All tensors of the folder, from model.safetensors or from the shards that its index names."""
    index, shards = folder / "model.safetensors.index.json", ["model.safetensors"]
    if index.exists() and not (folder / "model.safetensors").exists():
        names = data.read_object(index).get("weight_map")
        shards = [*names.values()] if isinstance(names, dict) and names else [names]
        for shard in shards:
            if not re.fullmatch(r"[^/\\\0]+\.safetensors", str(shard)):  # stays inside the folder
                told = f"weight_map names {shard!r}; only .safetensors files beside it are read"
                raise UserError(f"{index}: {told}")
    tensors = {}
    for path in (folder / shard for shard in sorted(set(shards))):
        try:
            with data.readable(path, "only safetensors are read, never pickled .bin or .pt files"):
                tensors |= load_file(path)
        except SafetensorError as error:
            told = f"cannot be read as safetensors ({error}); get the file again"
            raise UserError(f"{path}: {told}") from None
    return tensors
