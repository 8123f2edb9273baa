"""How fast, and how much memory: sampling and the three kinds of training step, on this machine.

    python -m mincai.lab.bench                          the tiny model's shape
    python -m mincai.lab.bench --model gpt2 --dtype bfloat16

Weights are random, of the shape asked for: speed does not depend on them. On a GPU it first checks what only a GPU can
tell: that replayed graphs draw the tokens that the CPU draws, and that bfloat16 log-probs are near those of float32.
Times are the median of several repetitions after a first one that is not counted, with the device waited for.
"""

import statistics
import time
from dataclasses import dataclass
from functools import partial

import torch

from mincai import losses, ppo
from mincai.plumbing import data, memory, output
from mincai.plumbing.cli import arg, check_choice, number_bytes, pick_device, precision, run, set_threads
from mincai.plumbing.logprobs import answer_logp
from mincai.model import GPT, GPTConfig, ScalarModel
from mincai.sample import generate
from mincai.plumbing.weights import SHAPES

TINY = GPTConfig(vocab_size=1001, block_size=256, n_layer=4, n_head=4, n_embd=128)


@dataclass(frozen=True)
class Config:
    model: str = arg("tiny", f"shape: tiny, {', '.join(SHAPES)}")
    batch: int = arg(64, "rows sampled together, and answers of a PPO update")
    micro_batch: int = arg(16, "rows of one training forward")
    prompt: int = arg(64, "tokens of a prompt")
    max_new: int = arg(48, "tokens of an answer")
    repeat: int = arg(5, "repetitions of each measurement")
    dtype: str = arg("float32", "float32, or bfloat16 for matrix products")
    compile: bool = arg(False, "compile the networks of the training steps first")
    out: str = arg("", "JSON file to write, none if empty")
    device: str = arg("auto", "auto, cpu or cuda")
    threads: int = arg(0, "CPU threads, 0 chooses")


def median_seconds(work, repeat, device) -> float:
    """Seconds that work() takes, the median of `repeat` calls after one that is not counted."""
    times = []
    for _ in range(repeat + 1):
        wait(device)
        start = time.perf_counter()
        work()
        wait(device)
        times.append(time.perf_counter() - start)
    return statistics.median(times[1:])


def wait(device):
    if device == "cuda":
        torch.cuda.synchronize()


def check_gpu(config) -> dict[str, float]:
    """What a GPU must agree on with the CPU; AssertionError where it does not."""
    torch.manual_seed(0)
    model = GPT(config)
    prompts = [torch.randint(config.vocab_size, (n,)).tolist() for n in (5, 9, 17, 3)]
    here = generate(model, prompts, 24, {1}, generator=torch.Generator().manual_seed(1))
    logp = answer_logp(model, prompts, here.lists())
    model = model.cuda()
    there = generate(model, prompts, 24, {1}, generator=torch.Generator().manual_seed(1))
    assert there.lists() == here.lists(), "graphs on the GPU draw other tokens than the CPU"
    with precision("cuda", "bfloat16"):
        low = answer_logp(model, prompts, here.lists())
        generate(model, prompts, 24, {1}, generator=torch.Generator().manual_seed(1))  # captures under autocast as well
    gap = max(float((a - b).abs().max()) for a, b in zip(logp, low))
    assert gap < 0.1, f"bfloat16 log-probs are {gap:.3f} off"
    return {"bfloat16 log-probs, largest difference": gap}


def measure(config, cfg, device) -> dict[str, float]:
    """{what: tokens a second}, of sampled tokens for sampling, else of all real tokens that a step reads."""
    torch.manual_seed(0)
    model = GPT(config).to(device)
    critic, pm = (ScalarModel(GPT(config)).to(device) for _ in range(2))
    ref = GPT(config).to(device).requires_grad_(False)
    ref.load_state_dict(model.state_dict())
    nets = [torch.compile(m) if cfg.compile else m for m in (model, critic)]
    prompts = torch.randint(config.vocab_size, (cfg.batch, cfg.prompt)).tolist()
    rows = [(p, p[:cfg.max_new]) for p in prompts[:cfg.micro_batch]]
    optimizers = [torch.optim.AdamW(m.parameters(), 1e-5, fused=device == "cuda") for m in (model, critic, pm)]
    generator = torch.Generator(device).manual_seed(0)
    length = cfg.prompt + cfg.max_new
    found = {}

    def sampling():
        with precision(device, cfg.dtype):
            generate(model, prompts, cfg.max_new, set(), generator=generator)

    def sft():
        ids, targets, mask = data.sft_batch(rows, device)
        with precision(device, cfg.dtype):
            logits = model.unembed(nets[0](ids))
        losses.sft_loss(logits, targets, mask)[0].backward()
        optimizers[0].step()
        optimizers[0].zero_grad(set_to_none=True)

    def pairs():
        ids, valid = data.right_pad([p + a for p, a in rows] * 2, device)
        with precision(device, cfg.dtype):
            scores = pm(ids)[:, -1]
        n = len(rows)
        losses.preference_loss(scores[:n], scores[n:], torch.full((n,), 0.7, device=device))[0].backward()
        optimizers[2].step()
        optimizers[2].zero_grad(set_to_none=True)

    def update():
        with precision(device, cfg.dtype):
            batch = ppo.rollout(nets[0], ref, nets[1], prompts, max_new=cfg.max_new, stop=set(),
                                micro_batch=cfg.micro_batch, generator=generator)
            scores, _ = ppo.score(batch, ppo.preference_score(pm, cfg.micro_batch), stop=set(), missing_eos_penalty=0.0)
        adv, returns = ppo.advantages(batch, scores, beta=0.1, gamma=1.0, lam=0.95)
        ppo.update(*nets, *optimizers[:2], batch, adv, returns, epochs=1, minibatches=1, clip=0.2, value_clip=0.2,
                   micro_batch=cfg.micro_batch, max_norm=1.0, generator=torch.Generator().manual_seed(0),
                   precision=partial(precision, device, cfg.dtype))

    hidden = torch.randn(len(rows), length, config.n_embd, device=device)

    def logits():  # in float32 whatever --dtype says: what that costs of a step
        with precision(device, cfg.dtype):
            model.unembed(hidden).sum().backward()
        model.zero_grad(set_to_none=True)

    for name, work, tokens in (("sampling", sampling, cfg.batch * cfg.max_new), ("SFT step", sft, len(rows) * length),
                               ("logits, there and back", logits, len(rows) * length),
                               ("preference step", pairs, 2 * len(rows) * length),
                               ("PPO update", update, cfg.batch * length)):
        if device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        found[name] = tokens / median_seconds(work, cfg.repeat, device)
        if device == "cuda":
            found[f"{name}: peak GB"] = torch.cuda.max_memory_allocated() / 1e9
    return found


def main(cfg: Config) -> dict:
    if cfg.out:
        output.check_file(cfg.out)
    threads, device = set_threads(cfg.threads), pick_device(cfg.device)
    check_choice("model", cfg.model, ("tiny", *SHAPES))
    config = TINY if cfg.model == "tiny" else SHAPES[cfg.model]
    memory.announce("ppo", config, device, "--batch or --micro-batch", batch=cfg.batch, length=cfg.prompt + cfg.max_new,
                    micro_batch=cfg.micro_batch, answer=cfg.max_new, dtype_bytes=number_bytes(cfg.dtype),
                    cache_bytes=number_bytes(cfg.dtype))
    found = check_gpu(TINY) if device == "cuda" else {}
    found |= measure(config, cfg, device)
    print(f"bench: {memory.parameters(config):,} parameters, {cfg.dtype}, {data.stamp(cfg)['device']}, {threads} "
          f"threads, torch {torch.__version__}")
    for name, number in found.items():
        shown = f"{number:12,.3f}" if "GB" in name or "log-probs" in name else f"{number:12,.0f} tokens/s"
        print(f"  {name:42} {shown}")
    if cfg.out:
        data.write_json(cfg.out, data.stamp(cfg, found=found))
    return found


if __name__ == "__main__":
    run(main, Config, __doc__)
