"""Sampling with a KV cache. Token ids in, token ids out: it knows no text.

Every token is drawn by one uniform number held against the cumulative softmax of its row. The
numbers are drawn before the first token, one row of them per sample, so a row's text does not
depend on which other rows stopped early, nor on whether it ran on a CPU or through a CUDA graph. At
temperature 1, the default, this is the model's own distribution; PPO reads the log-probs once more,
in one forward, and holds them against these.

Prompts are padded on the left, so that all answers start in one column; the padding is hidden from
attention and takes no positions. Shapes: B rows, P prompt columns, R answer columns, S cache
columns (P + max_new), V vocabulary.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from tqdm import tqdm

from mincai import Diverged, UserError
from mincai.losses import gather_logp
from mincai.model import GPT, KVCache, attention_mask, positions_of
from mincai.plumbing import workers

SHARED = 64  # tokens; fewer that rows begin with are read again in each of them


@dataclass(frozen=True)
class Samples:
    """Answers. R is the length of the longest; what lies outside the mask is 0."""

    ids: torch.Tensor  # (B, R) long
    mask: torch.Tensor  # (B, R) bool, True up to and including the stop token
    logp: torch.Tensor  # (B, R) float32, of the distribution that was sampled
    after: torch.Tensor | None  # (B, V) float32, logits after answer and `then`, if asked for

    def lists(self) -> list[list[int]]:
        """The tokens of each row, the stop token included."""
        lengths = self.mask.sum(1).tolist()
        return [row[:n] for row, n in zip(self.ids.tolist(), lengths)]


# --- padding --------------------------------------------------------------------------------------


def left_pad(prompts: list[list[int]], device=None):
    """Token lists to ids (B, P) long, 0 in the padding, and valid (B, P) bool, True at real
    tokens."""
    assert prompts and all(prompts), "an empty prompt"
    P = max(map(len, prompts))
    gaps = torch.tensor([P - len(prompt) for prompt in prompts])[:, None]  # (B, 1)
    ids = [[0] * (P - len(prompt)) + list(prompt) for prompt in prompts]
    return torch.tensor(ids).to(device), (torch.arange(P) >= gaps).to(device)  # (B, P), (B, P)


def check_room(model, lengths, max_new):
    """UserError when a prompt and what is to follow it do not fit into the model's positions."""
    limit, longest = model.config.block_size, max(lengths)
    if longest + max_new > limit:
        raise UserError(
            f"a prompt of {longest} tokens and {max_new} more make {longest + max_new}, but the model reads "
            f"at most {limit}: shorten the prompt (number {lengths.index(longest)} of this batch, from 0) or "
            f"ask for fewer new tokens"
        )


def cache_dtype(model):
    """What keys and values are computed in: autocast's type where it is on, or the weights' own."""
    kind = model.device.type
    if torch.is_autocast_enabled(kind):
        return torch.get_autocast_dtype(kind)
    return model.wte.weight.dtype


# --- one token ------------------------------------------------------------------------------------


def pick(logits, uniform, temperature):
    """One token per row: logits (B, V) float32, uniform (B,) in [0, 1) -> ids (B,) long, logp (B,)
    float32.

    temperature 0 takes the likeliest token, with its log-prob in the plain softmax. Otherwise the
    log-prob is of the distribution sampled, so temperature counts: another would bias PPO's ratio
    and every KL estimate.
    """
    if temperature == 0:
        ids = logits.argmax(-1)
        return ids, gather_logp(logits, ids)
    logits = logits / temperature
    cdf = torch.softmax(logits, dim=-1).cumsum(-1)  # (B, V)
    total = cdf[:, -1:]  # 1 but for rounding
    # Strictly below the total, so that the first entry above it exists and has a probability
    # greater than 0
    point = torch.minimum(uniform[:, None] * total, torch.nextafter(total, torch.zeros_like(total)))
    ids = torch.searchsorted(cdf, point, right=True).squeeze(1)  # (B,)
    # Beyond the last only if the logits are NaN: then logp says so, and `generate`
    ids = ids.clamp(max=logits.shape[-1] - 1)
    return ids, gather_logp(logits, ids)


def _is_stop(ids, stop):
    """Which ids are in stop (K,) long. Not torch.isin, which sorts long inputs and then waits for
    the GPU."""
    return (ids[..., None] == stop).any(-1)


# --- many tokens ----------------------------------------------------------------------------------


def shared_prefix(prompts) -> int:
    """How many tokens all prompts begin with, if that is worth a forward of its own; at least one
    token is left of each."""
    least = min(map(len, prompts)) - 1
    columns = enumerate(zip(*prompts))
    same = next((i for i, column in columns if i == least or len(set(column)) > 1), 0)
    return same if len(prompts) > 1 and same >= SHARED else 0


@torch.no_grad()
def read(model, prompts, room: int):
    """Read prompts into a cache with room for so many tokens more -> cache, which of its columns
    count (B, P) bool, and the logits (B, V) after each prompt.

    What all of them begin with, worked examples for instance, is read once: its keys and values are
    the same in every row.
    """
    same, device, config = shared_prefix(prompts), model.device, model.config
    ids, valid = left_pad([prompt[same:] for prompt in prompts], device)
    valid = F.pad(valid, (same, 0), value=True)
    rows = 1 if same else len(ids)
    cache = KVCache(config, rows, valid.shape[1] + room, device, cache_dtype(model))
    if same:
        model(torch.tensor([list(prompts[0][:same])], device=device), cache=cache)
        cache.keep(torch.zeros(len(ids), dtype=torch.long, device=device))
    mask, positions = attention_mask(valid)[:, same:], positions_of(valid)[:, same:]
    hidden = model(ids, positions, mask, cache)
    return cache, valid, model.unembed(hidden[:, -1])  # the last column is no padding


@torch.no_grad()
def generate(
    model: GPT,
    prompts,
    max_new: int,
    stop,
    temperature=1.0,
    generator=None,
    n=1,
    uniforms=None,
    then=(),
) -> Samples:
    """Sample n answers to each prompt, at most max_new tokens long, each ending at the first id in
    `stop`.

    Rows are prompt-major: the n answers to prompt 0 first. Each prompt is read once and its cache
    repeated. uniforms (B, max_new): the random numbers to use instead of drawing them. then: tokens
    to read after each answer, in its stop token's place (an answer without one stays whole);
    `after` are the logits that follow, from the same cache, without reading the row again. Raises
    UserError when a prompt, max_new and `then` do not fit into the model's positions together, and
    Diverged for log-probs that are no finite numbers.
    """
    assert max_new > 0 and n > 0 and temperature >= 0, (max_new, n, temperature)
    check_room(model, [len(p) for p in prompts], max_new + len(then))
    device = model.device
    cache, valid, logits = read(model, prompts, max_new)  # (B / n, P), (B / n, V)
    if n > 1:
        repeat = torch.arange(len(valid), device=device).repeat_interleave(n)
        cache.keep(repeat)
        valid, logits = valid[repeat], logits[repeat]
    if uniforms is None:
        where = device if generator is None else generator.device
        uniforms = torch.rand(len(valid), max_new, generator=generator, device=where)
    uniforms = uniforms.to(device)  # (B, max_new)
    stop = torch.tensor(sorted(stop), dtype=torch.long, device=device)
    decode = _decode_graph if device.type == "cuda" else _decode_eager
    then = torch.tensor(then, dtype=torch.long, device=device)
    drawing = Drawing(model, cache, valid, uniforms, stop, temperature, then)
    ids, logp, after = decode(drawing, logits)
    stops = _is_stop(ids, stop).long()
    mask = stops.cumsum(1) - stops == 0  # no stop token before this one
    R = int(mask.sum(1).max())
    ids, mask, logp = ids[:, :R], mask[:, :R], logp[:, :R]
    if not torch.isfinite(logp[mask]).all():
        raise Diverged(
            "the model's log-probs are no finite numbers: its weights hold NaN, or the temperature is too "
            "near to 0; look at the run that made it"
        )
    return Samples(ids.masked_fill(~mask, 0), mask, logp.masked_fill(~mask, 0.0), after)


@dataclass(frozen=True)
class Drawing:
    """What a decoder works with, beside the logits (B, V) after the prompts."""

    model: GPT
    cache: KVCache
    valid: torch.Tensor  # (B, P) bool
    uniforms: torch.Tensor  # (B, max_new)
    stop: torch.Tensor  # (number of stop tokens,) long
    temperature: float
    then: torch.Tensor  # (K,) long, to read after each answer; K may be 0

    def nothing(self):
        """ids and logp (B, max_new) to fill."""
        logp = torch.zeros_like(self.uniforms)
        return torch.zeros_like(logp, dtype=torch.long), logp

    def read_on(self, rows, valid):
        """Logits (B', V) after the tokens that valid (B', S) leaves in sight of these rows (B',) of
        the cache, and then `then`."""
        (B, S), K, device = valid.shape, len(self.then), valid.device
        causal = torch.ones(B, K, K, dtype=torch.bool, device=device).tril()
        mask = torch.cat([valid[:, None].expand(B, K, S), causal], dim=2)  # (B', K, S + K)
        cache = KVCache(self.model.config, B, S + K, device, self.cache.k.dtype)
        cache.k[:, :, :, :S] = self.cache.k[:, rows, :, :S]
        cache.v[:, :, :, :S] = self.cache.v[:, rows, :, :S]
        cache.seen = S
        positions = valid.sum(1, keepdim=True) + torch.arange(K, device=device)
        return self.model.unembed(self.model(self.then.expand(B, K), positions, mask, cache)[:, -1])


@torch.inference_mode()
def _decode_eager(d: Drawing, logits):
    """Token by token until every row has stopped -> ids, logp (B, max_new), arbitrary after a row's
    stop token, and the logits (B, V) after `then`, None if there is nothing to read."""
    (B, max_new), P, uniforms = d.uniforms.shape, d.valid.shape[1], d.uniforms
    after = torch.zeros_like(logits) if len(d.then) else None
    out_ids, out_logp = d.nothing()
    rows = torch.arange(B, device=logits.device)  # which sample each row of the cache belongs to
    finished = torch.zeros_like(rows, dtype=torch.bool)
    bias = torch.zeros(B, P + max_new, dtype=d.cache.k.dtype, device=rows.device)
    bias[:, :P].masked_fill_(~d.valid, float("-inf"))  # in columns that do not count
    positions = d.valid.sum(1)  # (B'), of the token about to be drawn
    for t in range(max_new):
        token, logp = pick(logits, uniforms[:, t], d.temperature)
        out_ids[rows, t], out_logp[rows, t] = token, logp
        finished = finished | _is_stop(token, d.stop)
        done = int(finished.sum())
        if done == len(rows) or t == max_new - 1 and after is None:
            break
        if 4 * done >= len(rows):  # copying the cache costs, carrying finished rows costs more
            alive, gone = (some.nonzero().squeeze(1) for some in (~finished, finished))
            if after is not None:
                after[rows[gone]] = d.read_on(gone, bias[gone, : d.cache.seen] == 0)
            d.cache.keep(alive)
            some = rows, finished, uniforms, bias, positions, token
            rows, finished, uniforms, bias, positions, token = (x[alive] for x in some)
        bias[:, P + t].masked_fill_(finished, float("-inf"))
        last = d.model.step(token, positions, bias[:, : P + t + 1], d.cache)
        logits, positions = d.model.unembed(last), positions + 1
    if after is not None:
        every = torch.arange(len(rows), device=rows.device)
        after[rows] = d.read_on(every, bias[:, : d.cache.seen] == 0)
    return out_ids, out_logp, after


def _decode_graph(d: Drawing, logits):
    """The same as _decode_eager, with one CUDA graph replayed per token: a small model is all
    launch overhead.

    A graph replays the same kernels on the same memory, so everything that changes from token to
    token lives in a tensor that the step itself advances, no row is dropped, and attention runs
    over the whole cache under a mask. The host looks at the device only every 16 tokens. Without a
    GPU the steps run one by one (for the tests).
    """
    (B, max_new), P, device = d.uniforms.shape, d.valid.shape[1], logits.device
    out_ids, out_logp = d.nothing()
    finished = torch.zeros(B, dtype=torch.bool, device=device)
    visible = torch.cat([d.valid, torch.zeros_like(out_ids, dtype=torch.bool)], dim=1)  # (B, S)
    positions = d.valid.sum(1, keepdim=True)  # (B, 1), of the token about to be drawn
    step_index = torch.zeros(1, dtype=torch.long, device=device)
    column = step_index + P  # (1,), where its key goes in the cache

    def step():
        uniform = d.uniforms.index_select(1, step_index).squeeze(1)  # (B,)
        token, logp = pick(logits, uniform, d.temperature)
        out_ids.index_copy_(1, step_index, token[:, None])
        out_logp.index_copy_(1, step_index, logp[:, None])
        finished.logical_or_(_is_stop(token, d.stop))
        visible.index_fill_(1, column, True)
        # at the very end this is one forward too many, which costs little
        hidden = d.model(token[:, None], positions, visible[:, None], d.cache, column)
        logits.copy_(d.model.unembed(hidden[:, -1]))
        for counter in (step_index, column, positions):
            counter.add_(1)

    advance, warm = step, 0
    if device.type == "cuda":
        warm = min(3, max_new)  # real steps, off the graph, in which libraries set themselves up
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(warm):
                step()
        torch.cuda.current_stream().wait_stream(side)
        if warm < max_new:
            graph = torch.cuda.CUDAGraph()
            # autocast would keep 16-bit copies of the weights for its whole context; made in a
            # capture they live in the graph's own memory, so every replay has to make them
            kind, on = torch.get_autocast_dtype("cuda"), torch.is_autocast_enabled("cuda")
            auto = torch.autocast("cuda", kind, on, cache_enabled=False)
            # thread_local: a data loader's thread that pins memory meanwhile must not break the
            # capture
            with torch.cuda.graph(graph, capture_error_mode="thread_local"), auto:
                step()  # recorded, not run
            advance = graph.replay
    for t in range(warm, max_new):
        advance()
        if t % 16 == 15 and finished.all():
            break
    if not len(d.then):
        return out_ids, out_logp, None
    before_stop = _is_stop(out_ids, d.stop).cumsum(1) == 0  # (B, max_new)
    everyone = torch.arange(B, device=device)
    return out_ids, out_logp, d.read_on(everyone, torch.cat([d.valid, before_stop], 1))


def generate_batched(
    model, prompts, max_new, stop, batch_size=64, temperature=1.0, generator=None, n=1, **more
) -> list[list[int]]:
    """`generate` for any number of prompts, batch_size rows at a time -> token lists, prompt-major
    as there.

    Prompts of similar length share a batch, so little is padded. A row's random numbers are drawn
    in the order of the prompts, whatever the batches, so batch_size does not change what is
    sampled. more: desc and journal, see `by_chunks`.
    """
    where = model.device if generator is None else generator.device
    uniforms = torch.zeros(len(prompts), n, max_new)
    if temperature > 0:
        uniforms = torch.rand(len(prompts) * n, max_new, generator=generator, device=where)
        uniforms = uniforms.view(len(prompts), n, max_new)

    def write(chunk):
        some, how = [prompts[i] for i in chunk], dict(n=n, uniforms=uniforms[chunk].flatten(0, 1))
        rows = generate(model, some, max_new, stop, temperature, **how).lists()
        return [rows[k * n : (k + 1) * n] for k in range(len(chunk))]

    lengths = [len(p) for p in prompts]
    answers = by_chunks(write, lengths, max(1, batch_size // n), model, **more)
    return [answer for some in answers for answer in some]


def generate_then(model: GPT, prompts, max_new: int, stop, batch_size, then, of, **more):
    """What `generate_batched` writes at temperature 0, and what the model makes of it: (token
    lists, log-probs (N, len(of)) float32 on the CPU of the tokens `of`, after answer and
    `then`)."""

    def write(chunk):
        some, uniforms = [prompts[i] for i in chunk], torch.zeros(len(chunk), max_new)
        samples = generate(model, some, max_new, stop, 0.0, uniforms=uniforms, then=then)
        logp = torch.log_softmax(samples.after, dim=-1)[:, of]
        return list(zip(samples.lists(), logp.tolist()))

    found = by_chunks(write, [len(p) for p in prompts], batch_size, model, **more)
    logp = torch.tensor([logp for _, logp in found]).reshape(-1, len(of))
    return [answer for answer, _ in found], logp


def by_chunks(work, lengths, size, model, desc=None, journal=None) -> list:
    """What work(chunk) gives, a result for each item of a list of their numbers, in the items'
    order.

    lengths: of the items, of which `size` make a chunk. desc: the name of a progress bar, None for
    none. journal: where results are written down as they come; those that it holds already are not
    made again (plumbing/progress.py).
    """
    found = journal.begin() if journal else {}
    left = [i for i in range(len(lengths)) if i not in found]
    parts = [[left[k] for k in chunk] for chunk in chunks([lengths[i] for i in left], size)]
    with tqdm(total=len(left), desc=desc, disable=desc is None, unit="prompt") as bar:
        for part, results in zip(parts, workers.spread(work, parts, workers.number(model))):
            if journal:
                journal.add(part, results)
            found.update(zip(part, results))
            bar.update(len(part))
    return [found[i] for i in range(len(lengths))]


def chunks(lengths, size):
    """Indices sorted by length, longest first (what does not fit into memory fails at once), `size`
    at a time."""
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    return [order[i : i + size] for i in range(0, len(order), size)]
