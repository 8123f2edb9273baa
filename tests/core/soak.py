"""Many updates of PPO: python tests/core/soak.py MODEL PM [updates] [metrics.json]

Says whether memory stays flat, the ratio of every first minibatch is 1, the reference stays as it
was, and all figures are finite. Exit code 1 where not.
"""

import hashlib
import json
import math
import os
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import train_ppo  # noqa: E402
from mincai import ppo  # noqa: E402

PAGE = os.sysconf("SC_PAGE_SIZE") / 2**20


def megabytes() -> float:
    """What this process has in memory now (Linux)."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * PAGE


def fingerprint(model) -> str:
    weights = b"".join(p.detach().numpy().tobytes() for p in model.parameters())
    return hashlib.sha256(weights).hexdigest()


def main(model, pm, updates=500, out="") -> int:
    references, memory, real = set(), [], ppo.rollout

    def rollout(policy, ref, critic, *args, **how):
        if len(memory) % 50 == 0:
            references.add(fingerprint(ref))
        memory.append(megabytes())
        return real(policy, ref, critic, *args, **how)

    ppo.rollout = rollout
    with tempfile.TemporaryDirectory() as folder:
        prompts = str(ROOT / "data" / "tiny" / "prompts.jsonl")
        cfg = train_ppo.Config(
            model=model,
            pm=pm,
            prompts=prompts,
            updates=int(updates),
            batch_size=32,
            out=f"{folder}/ppo",
        )
        train_ppo.main(cfg)
        rows = [json.loads(line) for line in Path(cfg.out, "metrics.jsonl").open()]
    at = {u: round(memory[u]) for u in (10, 50, len(memory) // 2, len(memory) - 1)}
    numbers = [x for row in rows for x in row.values()]
    found = {
        "updates": len(rows),
        "megabytes": at,
        "largest_first_ratio_error": max(row["first_ratio_error"] for row in rows),
        "references": len(references),
        "finite": all(map(math.isfinite, numbers)),
        "score": [rows[0]["score"], rows[-1]["score"]],
        "kl_exact": [rows[0]["kl_exact"], max(row["kl_exact"] for row in rows)],
    }
    print(json.dumps(found, indent=2))
    if out:
        Path(out).write_text(json.dumps(found | {"memory": memory, "rows": rows}))
    # the first tenth is the allocator's
    flat = max(memory[len(memory) // 2 :]) < 1.05 * max(memory[: len(memory) // 2])
    fine = flat and found["largest_first_ratio_error"] == 0 and found["finite"]
    return 0 if fine and len(references) == 1 else 1


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
