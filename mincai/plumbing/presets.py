"""Ready settings of the whole loop, by name: what each stage does otherwise than by default.

    tiny         the shipped model of a million parameters: a CPU, a few minutes
    small        a larger world and a model of 15 million parameters, made first: one GPU
    gpt2         GPT-2's 124M weights and the English prompts: one card of 24 GB
    gpt2-medium  355M: 48 GB; gpt2-large  774M: 80 GB
    gpt2-full    gpt2 with 40,000 attacks to evaluate on and 250,000 comparisons to learn from

A preset holds nothing but flags: every one can be given to its stage by hand, and every run folder
records them all.
"""

from dataclasses import dataclass, field, replace

from mincai import DATA


@dataclass(frozen=True)
class Preset:
    base: str  # a folder, or the name of published weights
    prompts: str = ""  # folder of prompts.jsonl and prompts_eval.jsonl; "" is the base's own
    memory: str = ""  # what it needs, for the first line that is printed
    world: dict | None = None  # how to pretrain the base; None: it has to be there
    # english.py's flags, where the prompts are made for the run, out of `prompts`
    write: dict | None = None
    english: bool = False  # no oracle can grade: assess.py in evaluate.py's place
    critique: dict = field(default_factory=dict)
    sft: dict = field(default_factory=dict)
    feedback: dict = field(default_factory=dict)
    pm: dict = field(default_factory=dict)
    ppo: dict = field(default_factory=dict)
    evaluate: dict = field(default_factory=dict)


FAST = dict(dtype="bfloat16")


def _gpt2(name: str, memory: str, rows: int, micro: int) -> Preset:
    """rows: sampled together; micro: rows of one forward pass in training."""
    fewshot = str(DATA / "english" / "fewshot.json")
    shots = dict(fewshot=fewshot, batch_size=rows, max_new=96, **FAST)
    learns = dict(micro_batch=micro, **FAST)
    judges = dict(samples=16, base_samples=2, pairs=24, reasons=False, labels="clamped", ensemble=4)
    steps = dict(updates=300, batch_size=256, minibatches=4, max_new=96, warmup=10)
    return Preset(
        base=name,
        prompts=str(DATA / "english"),
        memory=memory,
        english=True,
        critique=dict(harmful=0, helpful=600, responses=4, rounds=4, temperature=0.7, **shots),
        sft=dict(learn="all", epochs=2, batch_size=32, lr=1e-5, **learns),  # "all" as in the paper
        feedback=dict(harmful=0, helpful=600, **judges, **shots),
        pm=dict(epochs=1, batch_size=32, lr=1e-5, contrast=0.0, freeze=0, **learns),
        ppo=dict(lr=1e-6, critic_lr=5e-6, beta=0.05, kl_target=6.0, **steps, **learns),
        evaluate=dict(shots),
    )


SMALL_WORLD = dict(size="small", tests=130, tokens=250_000_000, ranks=1536)
SMALL_WORLD |= dict(workers=12, check_every=2_000)
SMALL_MODEL = dict(n_layer=8, n_head=6, n_embd=384, batch_size=128, lr=1e-3, compile=True, **FAST)

GPT2 = _gpt2("gpt2", "24 GB of GPU memory", rows=128, micro=16)

PRESETS = {
    "tiny": Preset(base=str(DATA / "tiny")),
    "small": Preset(
        base=str(DATA / "small"),
        memory="about 12 GB of GPU memory",
        world=SMALL_WORLD | SMALL_MODEL,
        critique=dict(harmful=2_000, helpful=2_000, batch_size=1_024, **FAST),
        sft=dict(batch_size=64, lr=3e-4, **FAST),
        feedback=dict(harmful=2_800, helpful=5_000, pairs=40, batch_size=1_024, **FAST),
        pm=dict(epochs=1, batch_size=256, micro_batch=64, lr=5e-4, freeze=4, **FAST),
        ppo=dict(updates=40, batch_size=1_024, minibatches=4, micro_batch=256, lr=1e-4, **FAST),
        evaluate=dict(size="small", judged=2_000, batch_size=1_024),
    ),
    "gpt2": GPT2,
    # 10,560 prompts, 24 pairs each, are 253,440 comparisons where none drops out
    "gpt2-full": replace(
        GPT2,
        write=dict(wrappings=20, attacks=40_000),
        critique=GPT2.critique | dict(harmful=2_640, helpful=1_320, responses=2),
        feedback=GPT2.feedback | dict(harmful=5_280, helpful=5_280),
    ),
    "gpt2-medium": _gpt2("gpt2-medium", "48 GB of GPU memory", rows=96, micro=16),
    "gpt2-large": _gpt2("gpt2-large", "80 GB of GPU memory", rows=96, micro=8),
}
