"""The peak of host memory of feedback and train_pm at a given number of comparisons.

    TIKTOKEN_CACHE_DIR=... python tests/plumbing/host_memory.py feedback 200000
    python tests/plumbing/host_memory.py pm 200000

The stages' own main() runs, at the settings of preset gpt2-full but for one principle a pair.
Sampling, judging and learning are replaced, since they take a GPU and hold its memory. The last
line says what getrusage did.
"""

import resource
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch  # noqa: E402

import mincai.__main__ as pipeline  # noqa: E402
import train_pm  # noqa: E402
from mincai import feedback  # noqa: E402
from mincai.lab import english  # noqa: E402
from mincai.model import GPT, GPTConfig  # noqa: E402
from mincai.plumbing import checkpoint, data, health  # noqa: E402
from mincai.plumbing.presets import PRESETS  # noqa: E402
from mincai.plumbing.tokenizer import load_tokenizer  # noqa: E402

EOT = 50256


def settings(title: str, out: Path):
    """The preset's config of a stage, with a model of GPT-2's vocabulary and context, and small."""
    checkpoint.save(
        GPT(GPTConfig(n_layer=1, n_head=1, n_embd=8)),
        out / "base",
        {"bos_token_id": EOT, "eos_token_id": EOT},
    )
    cfg = pipeline.Config(
        preset="gpt2-full", out=str(out), base=str(out / "base"), device="cpu", threads=1
    )
    return {name: config for name, _, config in pipeline.stages(cfg)}[title]


def answers(model, prompts, max_new, *_, n=1, **__):
    """Token lists in the place of samples: 16 to 96 of them, and the end of text."""
    lengths = torch.randint(16, max_new, (len(prompts) * n,)).tolist()
    return [torch.randint(1_000, 20_000, (length,)).tolist() + [EOT] for length in lengths]


def run_feedback(number: int, out: Path) -> int:
    cfg = settings("AI feedback", out)
    prompts = -(-number // cfg.pairs)
    rows = english.read(english.Config(**PRESETS["gpt2-full"].write))["prompts"]
    harmful, benign = ([r for r in rows if r["kind"] == kind] for kind in ("harmful", "benign"))
    data.write_jsonl(
        out / "prompts.jsonl", harmful[: prompts // 2] + benign[: prompts - prompts // 2]
    )
    feedback.generate_batched = answers
    feedback.next_logp = lambda model, prompts, ids, *_: torch.log_softmax(
        torch.randn(len(prompts), len(ids)), 1
    )
    found = feedback.main(
        feedback.Config(
            **{
                **vars(cfg),
                "prompts": str(out / "prompts.jsonl"),
                "model": cfg.judge,
                "harmful": 0,
                "helpful": 0,
                "ensemble": 1,
                "reasons": False,
            }
        )
    )
    return found["pairs"]


def run_pm(number: int, out: Path) -> int:
    cfg = settings("preference model", out)
    decode = load_tokenizer(out / "base").decode

    def row(n):
        a, b = answers(None, [0], 96, n=2)
        return {
            "id": f"pair-{n:05d}",
            "prompt_id": str(n // 24),
            "prompt": f"{n // 24} " + "what is it then ? " * 14,
            "kind": "harmful",
            "category": "theft",
            "attack": "plain",
            "a": decode(a),
            "b": decode(b),
            "a_ids": a,
            "b_ids": b,
            "principle": "theft-01",
            "p_a": 0.4 + 0.2 * (n % 2),
            "reasons": "",
        }

    data.write_jsonl(out / "pairs.jsonl", map(row, range(number)))
    train_pm.step = lambda *_: {"loss": 0.0, "accuracy": 0.0, "grad_norm": 0.0}
    health.all_scores = lambda pm, pairs, *_: (torch.randn(len(pairs)), torch.randn(len(pairs)))
    paths = {"model": str(out / "base"), "pairs": (str(out / "pairs.jsonl"),), "prompts": ""}
    found = train_pm.main(train_pm.Config(**vars(cfg) | paths))
    return found["pairs"] + found["held"]


if __name__ == "__main__":
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        begun = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
        done = {"feedback": run_feedback, "pm": run_pm}[sys.argv[1]](int(sys.argv[2]), Path(folder))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6  # Linux counts in kilobytes
    print(f"{sys.argv[1]}: {done} comparisons, peak {peak:.2f} GB ({begun:.2f} GB before it began)")
