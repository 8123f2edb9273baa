"""How much memory a stage will need, told before it allocates any, and held against the GPU.

An estimate in bytes from the shapes alone, for one process. What is exact: weights, gradients,
moments, the KV cache, and what backward keeps of a block (measured, in the tests). What is left
out: the CUDA context, the allocator's fragments, libraries' workspaces; some per cent to a GB
together. Not everything is there at once: of TURNS only the largest counts.

Shapes: B rows, T tokens, C channels, L blocks, V vocabulary, nh heads.
"""

import re

import torch

from mincai import UserError
from mincai.model import GPTConfig
from mincai.plumbing import distributed

TURNS = {
    "while sampling": ("KV cache", "KV cache, read on", "reading prompts", "drawing tokens"),
    "before learning": ("log-probs",),
    "while learning": ("activations", "logits"),
    "in the step": ("optimiser's scratch",),
}
WHEN = {name: turn for turn, names in TURNS.items() for name in names}
FLOAT32 = 4
BYTES = {"float32": FLOAT32, "bfloat16": 2}  # of a number in the matrix products, by --dtype
# How many (rows, T, V) tensors in float32 are there at the worst moment
LEARNING = 4  # logits and their log-softmax, and the gradients of both: sft_loss, or policy_loss
COMPARING = 8  # in exact_kl, beside policy's and reference's logits (counted: 7.4)
DRAWING = 5  # in pick, beside the logits that are kept from token to token


def _embeddings(config):
    """Numbers in the token and position embeddings, and in the output's matrix if it is untied."""
    return (config.vocab_size * (2 - config.tied) + config.block_size) * config.n_embd


def parameters(config: GPTConfig) -> int:
    """How many numbers a GPT of this shape has; a token embedding that is tied counts once."""
    C = config.n_embd
    # c_attn 3, its c_proj 1, c_fc and c_proj 4 each; 9 C of biases, 4 C in two LayerNorms
    block = 12 * C * C + 13 * C
    return _embeddings(config) + config.n_layer * block + 2 * C


def block_bytes(config: GPTConfig, length: int, dtype_bytes=4, masked=False) -> int:
    """What backward keeps of one block, a token: bytes.

    Korthikanti et al. 2022 (arXiv 2205.05198), equation 1: s b h (34 + 5 a s / h) bytes in 16 bits.
    Of it go 2 s b h of dropout masks, because there is no dropout, and the whole second term,
    because fused attention (scaled_dot_product_attention) keeps no T x T matrix but one number a
    head and query. That leaves 16 C numbers: input of two LayerNorms 2, input of c_attn 1, q, k and
    v 3, of c_proj 1, of c_fc 1, of GELU 4, of c_proj 4.

    Under autocast to 16 bits (dtype_bytes 2) LayerNorm's inputs stay in float32, so it is 36 C
    bytes and not 64 / 2. masked: an explicit mask is kept once a block, as numbers, T a query.
    """
    kept = config.n_embd * (14 * dtype_bytes + 2 * FLOAT32)
    kept += FLOAT32 * (config.n_head + 4)  # 4: means and deviations of two LayerNorms
    return kept + masked * length * dtype_bytes


def _networks(stage, config, models):
    """(name, numbers it has, whether it learns) of each network a stage holds."""
    gpt = parameters(config)
    scalar = gpt + config.n_embd + 1  # the head's weight and bias
    if stage == "ppo":
        language = [("policy", gpt, True), ("reference", gpt, False)]
        return [*language, ("critic", scalar, True), ("preference model", scalar, False)]
    return [("model", scalar if stage == "pm" else models * gpt, stage != "sample")]


def plan(
    stage: str,
    config: GPTConfig,
    *,
    batch: int,
    length: int,
    micro_batch: int | None = None,
    answer: int | None = None,
    dtype="float32",
    models=1,
    reads_on=False,
) -> dict[str, int]:
    """What a stage puts into memory: {what: bytes}; `needed` says how much of it at once.

    stage: "sample" (answers, critiques, labels), "sft", "pm" or "ppo". batch: rows sampled at once
    (sample, ppo). micro_batch: rows of one training forward, batch if None; for "pm", pairs, of two
    rows each. length: tokens of the longest row, prompt and answer. answer: how many of them are
    the answer's at most (--max-new; length if None): only they meet the vocabulary in "ppo". dtype:
    "float32", or "bfloat16" by autocast, where weights, gradients and moments stay in float32 and
    16-bit copies of the weights are added. models: of "sample", that are there at once. reads_on:
    it goes on from the cache of what it has sampled, in a second one (`then` of generate).

    Too high rather than too low: all rows are as long as the longest, and frozen blocks learn.
    """
    assert min(batch, length, micro_batch or 1) > 0, (batch, length, micro_batch)
    C, V, L = config.n_embd, config.vocab_size, config.n_layer
    ppo, samples, learns = stage == "ppo", stage in ("sample", "ppo"), stage != "sample"
    rows = min(micro_batch or batch, batch) * (2 if stage == "pm" else 1)
    size, answer = BYTES[dtype], min(answer or length, length)
    networks = _networks(stage, config, models)

    lines, copied = {}, 0
    for name, numbers, trained in networks:
        lines[f"{name}: weights"] = FLOAT32 * numbers
        lines[f"{name}: gradients"] = FLOAT32 * numbers * trained
        lines[f"{name}: AdamW's two moments"] = 2 * FLOAT32 * numbers * trained
        # Autocast keeps copies of weights that may learn; it makes those of frozen ones anew. The
        # embeddings have none: they are looked up, and multiplied in float32.
        if trained or not learns:
            copied += numbers - models * _embeddings(config)

    # Of one token. Without backward one block is there at a time: the MLP's 8 C beside what comes
    # in; the mask as bool and as numbers
    read = 10 * C * FLOAT32 + length * (2 + size)
    # With it all are, one more for the gradients on their way down, input and output of ln_f
    masked = stage in ("pm", "ppo")  # rows are padded on the left
    kept = (L + 1) * block_bytes(config, length, size, masked) + 2 * C * FLOAT32
    cache = samples * 2 * L * batch * length * C * size  # keys and values
    logits = rows * V * FLOAT32  # of one token of each row
    lines |= {
        "16-bit copies of weights": (size < FLOAT32) * size * copied,
        "KV cache": cache,
        "KV cache, read on": reads_on * cache,
        "reading prompts": samples * batch * length * read,
        "drawing tokens": samples * DRAWING * batch * V * FLOAT32,
        "log-probs": ppo * COMPARING * answer * logits,
        "activations": learns * rows * length * kept,
        "logits": {"sft": length, "ppo": answer}.get(stage, 0) * LEARNING * logits,
        "optimiser's scratch": FLOAT32 * max(n * trained for _, n, trained in networks),
    }
    return {name: number for name, number in lines.items() if number}


def needed(plan: dict[str, int]) -> int:
    """Bytes at the worst moment: what stays, and the largest of the turns."""
    turns = [sum(plan.get(name, 0) for name in names) for names in TURNS.values()]
    return _stays(plan) + max(turns)


def _stays(plan):
    return sum(number for name, number in plan.items() if name not in WHEN)


def _gb(number):
    return f"{number / 1e9:.1f} GB" if number >= 1e9 else f"{number / 1e9:.3f} GB"


def table(plan: dict[str, int]) -> str:
    """The plan as lines to print, the total last."""
    rows = [*plan.items(), ("at most at once", needed(plan))]
    lines = [f"  {name:<34}{_gb(n):>10}  {WHEN.get(name, '')}".rstrip() for name, n in rows]
    return "\n".join(["memory, estimated:", *lines])


def check(plan: dict[str, int], available: int | None, flags: str):
    """UserError if the plan needs more than what is available (bytes; None: not known). flags:
    those of the stage that make it smaller."""
    if available is None or needed(plan) <= available:
        return
    need, free, stays = map(_gb, (needed(plan), available, _stays(plan)))
    advice = f"lower {flags}, or take"
    if _stays(plan) >= available:
        advice = f"the weights and what belongs to them alone take {stays}, so take"
    told = f"this needs about {need} of GPU memory and {free} are free"
    raise UserError(f"{told}; {advice} a smaller model")


def available(device) -> int | None:
    """Bytes a GPU has left for this process, those that torch has taken and does not use included;
    None on the CPU, whose memory is shared with everything else."""
    device = torch.device(device)
    if device.type != "cuda":
        return None
    index = torch.cuda.current_device() if device.index is None else device.index
    free, _ = torch.cuda.mem_get_info(index)
    return free + torch.cuda.memory_reserved(index) - torch.cuda.memory_allocated(index)


def announce(stage: str, config: GPTConfig, device, flags: str, **sizes) -> None:
    """Print the plan, before anything is allocated, and hold it against the GPU; UserError if it
    does not fit. On a CPU a plan under a GB is not worth its lines."""
    found, room = plan(stage, config, **sizes), available(device)
    if distributed.is_main() and (room is not None or needed(found) > 1e9):
        print(table(found), flush=True)
    check(found, room, flags)


def shortage(error: torch.cuda.OutOfMemoryError) -> str:
    """One line for torch's many: how much more was asked for, and what to do."""
    tried = re.search(r"Tried to allocate ([\d.]+ \w+)", str(error))
    asked = f" (it was asked for {tried[1]} more)" if tried else ""
    advice = "lower --micro-batch, --batch-size or --max-new, where it has them"
    return f"the GPU is out of memory{asked}; {advice}; finished stages are kept"
