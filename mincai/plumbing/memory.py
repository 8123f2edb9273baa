"""How much memory a stage will need, before anything is allocated: a plan to print, and to hold against the GPU.

An estimate in bytes from the shapes alone. What is exact: weights, gradients, moments, the KV cache, and what backward
keeps of a block (measured, in the tests). What is left out: the CUDA context, the allocator's fragments, libraries'
workspaces; some per cent to a GB together. All of it is for one process: with several, each has its own GPU and its
own share of the batch.

Not everything is there at once. While answers are sampled there is a KV cache and no activations; while they are
learned from it is the other way round. TURNS says what takes turns; only the largest turn counts.

Shapes: B rows, T tokens, C channels, L blocks, V vocabulary, nh heads.
"""

import re
from contextlib import contextmanager

import torch

from mincai import UserError
from mincai.plumbing import distributed
from mincai.model import GPTConfig

TURNS = {"while sampling": ("KV cache", "KV cache, read on", "reading prompts", "drawing tokens"),
         "before learning": ("log-probs",),
         "while learning": ("activations", "logits"),
         "in the step": ("optimiser's scratch",)}
FLOAT32 = 4
# How many (rows, T, V) tensors in float32 are there at the worst moment
LEARNING = 4   # logits and their log-softmax, and the gradients of both: sft_loss, or gather_logp and policy_loss
COMPARING = 8  # in exact_kl, beside policy's and reference's logits (counted: 7.4)
DRAWING = 5    # in pick, beside the logits that are kept from token to token


def parameters(config: GPTConfig) -> int:
    """How many numbers a GPT of this shape has; tied logits use the token embedding again, so it counts once."""
    C = config.n_embd
    block = 12 * C * C + 13 * C  # c_attn 3, its c_proj 1, c_fc and c_proj 4 each; 9 C of biases, 4 C in two LayerNorms
    return (config.vocab_size * (2 - config.tied) + config.block_size) * C + config.n_layer * block + 2 * C


def block_bytes(config: GPTConfig, length: int, dtype_bytes=4, masked=False) -> int:
    """What backward keeps of one block, a token: bytes.

    Korthikanti et al. 2022 (arXiv 2205.05198), equation 1: s b h (34 + 5 a s / h) bytes in 16 bits. Of it go 2 s b h
    of dropout masks, because there is no dropout, and the whole second term, because fused attention
    (scaled_dot_product_attention) keeps no T x T matrix but one number a head and query. That leaves 16 C numbers:
    input of two LayerNorms 2, input of c_attn 1, q, k and v 3, of c_proj 1, of c_fc 1, of GELU 4, of c_proj 4.

    Under autocast to 16 bits (dtype_bytes 2) LayerNorm's inputs stay in float32, so it is 36 C bytes and not 64 / 2.
    masked: an explicit mask is kept once a block, as numbers, T for each query.
    """
    kept = config.n_embd * (14 * dtype_bytes + 2 * FLOAT32) + FLOAT32 * (config.n_head + 4)  # 4: means, deviations
    return kept + masked * length * dtype_bytes


def _network(name, numbers, learns):
    lines = {f"{name}: weights": FLOAT32 * numbers}
    if learns:
        lines |= {f"{name}: gradients": FLOAT32 * numbers, f"{name}: AdamW's two moments": 2 * FLOAT32 * numbers}
    return lines


def plan(stage: str, config: GPTConfig, *, batch: int, length: int, micro_batch=None, answer=None, dtype_bytes=4,
         cache_bytes=4, logits=True, models=1, reads_on=False) -> dict[str, int]:
    """What a stage puts into memory: {what: bytes}; `needed` says how much of it at once.

    stage: "sample" (answers, critiques, labels), "sft", "pm" or "ppo". batch: rows sampled at once (sample, ppo).
    micro_batch: rows of one training forward, batch if None; for "pm", pairs, of two rows each. length: tokens of
    the longest row, prompt and answer. answer: how many of them are the answer's at most (--max-new; length if None):
    only they meet the vocabulary in "ppo". dtype_bytes: 4, or 2 for bfloat16 by autocast, where weights, gradients and
    moments stay in float32 and 16-bit copies of the weights are added. cache_bytes: of a number in the KV cache.
    logits=False: a loss that makes no tensor of (rows, T, V). models: of "sample", that are there at once. reads_on: it
    goes on from the cache of what it has sampled, in a second one (`then` of generate).

    Too high rather than too low: all rows are as long as the longest, and frozen blocks are counted as if they learn.
    """
    assert stage in ("sample", "sft", "pm", "ppo"), stage
    assert min(batch, length, micro_batch or 1) > 0, (batch, length, micro_batch)
    C, V, L = config.n_embd, config.vocab_size, config.n_layer
    gpt, scalar = parameters(config), parameters(config) + C + 1  # weight and bias
    answer = length if answer is None else min(answer, length)
    rows = min(micro_batch or batch, batch) * (2 if stage == "pm" else 1)
    networks = {"sample": [("model", models * gpt, False)], "sft": [("model", gpt, True)],
                "pm": [("model", scalar, True)],
                "ppo": [("policy", gpt, True), ("reference", gpt, False), ("critic", scalar, True),
                        ("preference model", scalar, False)]}[stage]
    lines = {}
    for network in networks:
        lines |= _network(*network)
    if dtype_bytes < FLOAT32:  # autocast keeps copies of weights that may learn; it makes those of frozen ones anew
        embeddings = (V * (2 - config.tied) + config.block_size) * C  # looked up, and multiplied in float32
        lines["16-bit copies of weights"] = dtype_bytes * sum(
            numbers - (models if stage == "sample" else 1) * embeddings
            for _, numbers, learns in networks if learns or stage == "sample")
    if stage in ("sample", "ppo"):
        lines["KV cache"] = 2 * L * batch * length * C * cache_bytes
        if reads_on:
            lines["KV cache, read on"] = lines["KV cache"]
        # one block at a time without backward: the MLP's 8 C beside what comes in; the mask as bool and as numbers
        lines["reading prompts"] = batch * length * (10 * C * FLOAT32 + length * (2 + dtype_bytes))
        lines["drawing tokens"] = DRAWING * batch * V * FLOAT32
    if stage == "ppo" and logits:
        lines["log-probs"] = COMPARING * rows * answer * V * FLOAT32
    if stage != "sample":
        block = block_bytes(config, length, dtype_bytes, masked=stage == "ppo")
        # one block more for the gradients on their way down; behind the last, the input and output of ln_f
        lines["activations"] = rows * length * ((L + 1) * block + 2 * C * FLOAT32)
        if logits and stage != "pm":
            lines["logits"] = LEARNING * rows * (answer if stage == "ppo" else length) * V * FLOAT32
        lines["optimiser's scratch"] = FLOAT32 * max(numbers for _, numbers, learns in networks if learns)
    return lines


def needed(plan: dict[str, int]) -> int:
    """Bytes at the worst moment: what stays, and the largest of the turns."""
    turns = [sum(plan.get(name, 0) for name in names) for names in TURNS.values()]
    return sum(plan.values()) - sum(turns) + max(turns)


def _gb(number):
    return f"{number / 1e9:.1f} GB" if number >= 1e9 else f"{number / 1e9:.3f} GB"


def table(plan: dict[str, int]) -> str:
    """The plan as lines to print, the total last."""
    when = {name: turn for turn, names in TURNS.items() for name in names}
    lines = [f"  {name:<34}{_gb(number):>10}  {when.get(name, '')}".rstrip() for name, number in plan.items()]
    return "\n".join(["memory, estimated:", *lines, f"  {'at most at once':<34}{_gb(needed(plan)):>10}"])


def check(plan: dict[str, int], available: int | None, flags="--micro-batch, --batch or --max-new"):
    """UserError if the plan needs more than what is available (bytes; None: not known, nothing is checked).

    flags: those of the stage that make it smaller.
    """
    if available is None or needed(plan) <= available:
        return
    turns = {name for names in TURNS.values() for name in names}
    stays = sum(number for name, number in plan.items() if name not in turns)
    advice = f"lower {flags}, or take a smaller model"
    if stays >= available:
        advice = f"the weights and what belongs to them alone take {_gb(stays)}, so take a smaller model"
    raise UserError(f"this needs about {_gb(needed(plan))} of GPU memory and {_gb(available)} are free; {advice}")


def available(device) -> int | None:
    """Bytes a GPU has left for this process; None on the CPU, whose memory is shared with everything else.

    What torch has taken before and does not use now counts as free.
    """
    device = torch.device(device)
    if device.type != "cuda":
        return None
    index = torch.cuda.current_device() if device.index is None else device.index
    free, _ = torch.cuda.mem_get_info(index)
    return free + torch.cuda.memory_reserved(index) - torch.cuda.memory_allocated(index)


def announce(stage: str, config: GPTConfig, device, flags: str, **sizes) -> None:
    """Print the plan, before anything is allocated, and hold it against the GPU; UserError if it does not fit.

    On a CPU a plan under a GB is not worth its lines.
    """
    found, room = plan(stage, config, **sizes), available(device)
    if distributed.is_main() and (room is not None or needed(found) > 1e9):
        print(table(found), flush=True)
    check(found, room, flags)


@contextmanager
def out_of_memory(advice: str):
    """Turn torch's OutOfMemoryError into a UserError of one line. advice: "lower --micro-batch or --max-new"."""
    try:
        yield
    except torch.cuda.OutOfMemoryError as error:  # the name that torch 2.4 knows as well
        tried = re.search(r"Tried to allocate ([\d.]+ \w+)", str(error))
        tried = f" (it was asked for {tried[1]} more)" if tried else ""
        raise UserError(f"the GPU is out of memory{tried}; {advice}; finished stages are kept") from None
