"""Pieces of work to be timed, the same for mincai, another checkout of it, and transformers.

Random weights and prompts: speed does not depend on them. Run as a script it is another checkout's
clock (bench.py writes the pieces to it, one a line, and reads the seconds):

    python mincai/lab/works.py FOLDER THREADS DEVICE DTYPE

so it imports only torch at once, asks mincai for its public functions alone, and says of an older
checkout what that lacks.
"""

import dataclasses
import importlib.util
import json
import os
import subprocess
import sys
import time
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

SHAPES = {  # layers, heads, channels, vocabulary; 1,024 positions
    "tiny": (4, 4, 128, 1024),
    "256 wide": (4, 8, 256, 1024),
    "512 wide": (4, 16, 512, 1024),
    "gpt2": (12, 12, 768, 50257),
}
NO_STOP = {10**6}  # answers of full length
RATE = 1e-5  # of learning, which no time depends on


@dataclass(frozen=True)
class Work:
    kind: str  # what in_mincai does by this name
    shape: str | tuple  # a name in SHAPES, or four such numbers
    rows: int
    prompt: int  # tokens
    new: int = 0  # tokens of an answer
    header: int = 0  # tokens that all prompts begin with
    masked: int = 40  # tokens of an SFT row that are prompt
    micro: int = 0  # rows that PPO reads or learns from at once, 0: all
    epochs: int = 4  # of PPO

    @property
    def size(self) -> tuple[int, int, int, int]:
        return SHAPES.get(self.shape, self.shape)

    @property
    def name(self) -> str:
        length = f"{self.prompt} + {self.new}" if self.new else f"{self.prompt}"
        header = f", {self.header} of them shared" if self.header else ""
        return f"{self.kind}, {self.shape}, {self.rows} x {length} tokens{header}"

    @property
    def tokens(self) -> int:
        """Tokens drawn, where some are; else tokens read."""
        return self.rows * (self.new or self.prompt)

    def prompts(self) -> list[list[int]]:
        generator, vocabulary = torch.Generator().manual_seed(0), self.size[-1]
        size = (1 if self.kind == "one prompt" else self.rows, self.prompt)
        ids = torch.randint(1, vocabulary, size, generator=generator)
        ids[:, : self.header] = ids[0, : self.header]
        return ids.tolist()


def least_seconds(work: Work, bandwidth: float, rate: float) -> float:
    """What a machine of so many bytes and operations a second would take, were nothing else in the
    way: of every forward the longer of the two, float32."""
    layers, _, C, V = work.size
    blocks, head = layers * (12 * C * C + 13 * C), V * C

    def forward(rows, tokens, context, heads):
        """`tokens` more in each of these rows that see `context` columns on average."""
        seen = layers * C * context
        reads = 4 * (blocks + (head if heads else 0) + 2 * rows * seen)
        does = 2 * (rows * tokens * (blocks + 2 * seen) + heads * head)
        return max(reads / bandwidth, does / rate)

    rows, P, new, header = work.rows, work.prompt, work.new, work.header
    if work.kind == "judging":
        shared = forward(1, header, header / 2, 0)
        return shared + forward(rows, P - header, (P + header) / 2, rows)
    optimiser = 7 * 4 * (blocks + head) / bandwidth  # reads weight, gradient, two moments; writes 3
    if work.kind == "SFT step":
        return 3 * forward(rows, P - 1, P / 2, rows * (P - 1 - work.masked)) + optimiser
    asked = 1 if work.kind == "one prompt" else rows
    steps = (new - 1) * forward(rows, 1, P + new / 2, rows)
    sampling = forward(asked, P, P / 2, asked) + steps
    if work.kind != "PPO update":
        return sampling
    language, scalar = (forward(rows, P + new, (P + new) / 2, n) for n in (rows * new, 0))
    learning = work.epochs * (3 * language + 3 * scalar + 2 * optimiser)
    return sampling + 2 * language + 2 * scalar + learning


def ceilings(threads, device) -> tuple[float, float]:
    """Bytes read and matrix operations done a second here, the best of six, in float32."""
    x, a, b = (torch.ones(*size, device=device) for size in ((2**26,), (1024, 768), (768, 3072)))
    best = [
        min(seconds(work, threads, device) for _ in range(6)) for work in (x.sum, lambda: a @ b)
    ]
    return 4 * x.numel() / best[0], 2 * a.numel() * b.shape[1] / best[1]


def seconds(work, threads, device) -> float:
    """One thread's time is the processor's: other work on the machine hardly moves it."""
    wait = torch.cuda.synchronize if device == "cuda" else lambda: None
    now = time.process_time if threads == 1 and device == "cpu" else time.perf_counter
    wait()
    start = now()
    work()
    wait()
    return now() - start


# --- mincai ---------------------------------------------------------------------------------------


def adamw(model):
    return torch.optim.AdamW(model.parameters(), RATE, fused=True)


def in_mincai(work: Work, threads: int, device: str, dtype: str):
    """A function that does it once. Every piece runs on `threads` PyTorch threads, but learning of
    PPO as train_ppo.py does it."""
    from mincai import losses, ppo
    from mincai.model import GPT, GPTConfig, ScalarModel
    from mincai.sample import generate

    layers, heads, C, V = work.size
    config, prompts = GPTConfig(V, 1024, layers, heads, C), work.prompts()
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    model = GPT(config).to(device)
    precision = partial(torch.autocast, device, torch.bfloat16, enabled=dtype == "bfloat16")

    def cast(task):
        with precision():
            return task()

    def step(optimizer, loss):
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    if work.kind in ("sampling", "one prompt"):
        n = work.rows // len(prompts)
        return lambda: cast(lambda: generate(model, prompts, work.new, NO_STOP, n=n))
    if work.kind == "judging":
        try:
            from mincai.plumbing.logprobs import next_logp
        except ImportError:
            from mincai.logprobs import next_logp
        return lambda: cast(lambda: next_logp(model, prompts, [32, 33], work.rows))
    ids = torch.tensor(prompts, device=device)
    if work.kind == "SFT step":
        optimizer = adamw(model)
        targets = ids[:, work.masked + 1 :]

        def sft():
            logits = cast(lambda: model.unembed(model(ids[:, :-1])[:, work.masked :]))
            step(optimizer, losses.sft_loss(logits, targets, torch.ones_like(targets))[0])

        return sft
    if work.kind == "logits":  # in float32 whatever dtype says: what that costs of a step
        hidden = torch.randn(*ids.shape, C, device=device)

        def logits():
            cast(lambda: model.unembed(hidden)).sum().backward()
            model.zero_grad()

        return logits
    pm = ScalarModel(GPT(config)).to(device)
    if work.kind == "preference step":
        optimizer, n = adamw(pm), work.rows // 2
        labels = torch.full((n,), 0.7, device=device)

        def pairs():
            scores = cast(lambda: pm(ids)[:, -1])
            step(optimizer, losses.preference_loss(scores[:n], scores[n:], labels)[0])

        return pairs
    from mincai.plumbing import workers

    workers.use(threads)
    workers.fit(model)
    ref, critic = GPT(config).to(device).requires_grad_(False), ScalarModel(GPT(config)).to(device)
    ref.load_state_dict(model.state_dict())
    learners = [ppo.Learner(net, adamw(net)) for net in (model, critic)]
    generator, micro = torch.Generator(device).manual_seed(0), work.micro or work.rows
    how = ppo.Steps(work.epochs, 1, micro, clip=0.2, value_clip=0.2, precision=precision)

    def update():
        drawn = dict(max_new=work.new, stop=NO_STOP, micro_batch=micro, generator=generator)
        with precision():
            batch = ppo.rollout(model, ref, critic, prompts, **drawn)
            score = ppo.preference_score(pm, micro)
            scores, _ = ppo.score(batch, score, stop=NO_STOP, missing_eos_penalty=0.0)
        adv, returns = ppo.advantages(batch, scores, beta=0.05, gamma=1.0, lam=0.95)
        ppo.update(*learners, batch, adv, returns, how, torch.Generator().manual_seed(0))

    return update


# --- transformers ---------------------------------------------------------------------------------


def in_transformers(work: Work, threads: int, device: str, dtype: str):
    """The same by transformers' GPT-2 and its generate."""
    if work.kind == "PPO update":
        raise NotImplementedError("transformers has no PPO")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    from transformers import GenerationConfig, GPT2Config, GPT2LMHeadModel

    layers, heads, C, V = work.size
    how = dict(vocab_size=V, n_positions=1024, n_layer=layers, n_head=heads, n_embd=C)
    how |= dict(resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(**how, attn_implementation="sdpa")).to(device).eval()
    if dtype == "bfloat16" and work.kind != "SFT step":
        model = model.bfloat16()
    ids = torch.tensor(work.prompts(), device=device)
    n = work.rows // len(ids)
    asked = dict(do_sample=True, top_k=0, top_p=1.0, num_return_sequences=n, pad_token_id=0)
    length = dict(max_new_tokens=work.new or 1, min_new_tokens=work.new or 1, eos_token_id=None)

    def sampling():
        how = GenerationConfig(**asked, **length)
        model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=how)

    @torch.inference_mode()
    def judging():
        logits = model(ids, use_cache=False, logits_to_keep=1).logits[:, -1]
        torch.log_softmax(logits.float(), -1)[:, [32, 33]].cpu()

    optimizer, labels = adamw(model), ids.clone()
    labels[:, : work.masked + 1] = -100

    def sft():
        with torch.autocast(device, torch.bfloat16, enabled=dtype == "bfloat16"):
            loss = model(ids, labels=labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    kinds = {"sampling": sampling, "one prompt": sampling, "judging": judging, "SFT step": sft}
    return kinds[work.kind]


# --- another checkout -----------------------------------------------------------------------------


def clock(build, threads, device, dtype):
    """A function: work -> the seconds that it takes once. What it holds of the work before it lets
    go, which may be large."""
    built = {}

    def run(work: Work) -> float:
        if work not in built:
            built.clear()
            built[work] = build(work, threads, device, dtype)
        return seconds(built[work], threads, device)

    return run


@contextmanager
def peer(name, how):
    """A function: work -> its seconds there, or a line on what is lacking; None without a peer.
    name: transformers, or the folder of another mincai; how: threads, device, dtype."""
    if not name:
        yield None
    elif name == "transformers":
        there = importlib.util.find_spec(name)
        if there is None:
            print("bench: transformers is not installed; timed without it")
        yield there and clock(in_transformers, *how)
    else:
        if not Path(name, "mincai", "sample.py").is_file():
            from mincai import UserError

            advice = "give the folder of one, or transformers"
            raise UserError(f"--against {name}: no checkout of mincai there; {advice}")
        command = [sys.executable, __file__, name, *map(str, how)]
        pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        with subprocess.Popen(command, **pipes) as process:

            def run(work):
                process.stdin.write(json.dumps(dataclasses.asdict(work)) + "\n")
                process.stdin.flush()
                return json.loads(process.stdout.readline())

            yield run
            process.stdin.close()


def serve(folder, threads, device, dtype):
    """Do the pieces of work that come in on standard input by the mincai of that folder; write for
    each its seconds, or what that mincai lacks."""
    sys.path[0] = str(Path(folder).resolve())
    run = clock(in_mincai, int(threads), device, dtype)
    for line in sys.stdin:
        try:
            told = run(Work(**json.loads(line)))
        except (ImportError, AttributeError, TypeError) as error:
            told = str(error)
        print(json.dumps(told), flush=True)


if __name__ == "__main__":
    serve(*sys.argv[1:])
