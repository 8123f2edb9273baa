"""A run's metrics for TensorBoard, while it trains or afterwards.

    python -m mincai.lab.board runs/tiny --to logs          all there is now
    python -m mincai.lab.board runs/tiny --to logs --follow     and what comes, until Ctrl-C
    tensorboard --logdir logs

Needs the package tensorboard. Curves are read from metrics.jsonl: of a training that goes on it
lies in sft.progress/, pm.progress/ or ppo.progress/, and moves into sft/, pm/ or ppo/ at the end.
"""

import json
import math
import time
from dataclasses import dataclass
from pathlib import Path

from mincai import UserError
from mincai.lab.measure import run_folder
from mincai.plumbing import progress
from mincai.plumbing.cli import arg, run

SECONDS = 2.0  # between looks


@dataclass(frozen=True)
class Config:
    FIRST = "run"  # also given without its flag
    run: str = arg("runs/tiny", "the run folder")
    to: str = arg("logs", "folder for TensorBoard's files, new for every call")
    follow: bool = arg(False, "go on as long as it trains, until Ctrl-C")


def rows_of(folder: Path) -> list[dict]:
    """The whole rows of a stage's metrics, finished or on its way; none where there are no such
    files."""
    for place in (progress.place(folder), folder):
        try:
            text = (place / "metrics.jsonl").read_text(encoding="utf-8")
        except FileNotFoundError:
            continue
        whole = text[: text.rfind("\n") + 1]  # the last one may be half written
        return [json.loads(line) for line in whole.splitlines()]
    return []


def main(cfg: Config) -> int:
    """How many rows were written."""
    out = run_folder(cfg.run)
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise UserError("no package tensorboard; pip install tensorboard") from None
    seen = dict.fromkeys(("sft", "pm", "ppo"), 0)
    writers = {name: SummaryWriter(str(Path(cfg.to, name))) for name in seen}
    while True:
        for name, writer in writers.items():
            rows = rows_of(out / name)
            for row in rows[seen[name] :]:
                at = row.pop("update", row.pop("step", None))
                for key, value in row.items():
                    if isinstance(value, (int, float)) and math.isfinite(value):
                        writer.add_scalar(key, value, at)
            seen[name] = max(seen[name], len(rows))
            writer.flush()
        if not cfg.follow:
            break
        time.sleep(SECONDS)
    print(f"board: {sum(seen.values())} rows -> {cfg.to}")
    return sum(seen.values())


if __name__ == "__main__":
    run(main, Config, __doc__)
