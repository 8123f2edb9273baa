"""One process as if nothing were there; two processes (gloo, on the CPU) give what one gives with
the whole batch.

Run as a script, this file is one of the two: torchrun's variables in the environment, the results
to a JSON file.
"""

import faulthandler
import json
import os
import socket
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
from torch.testing import assert_close

import mincai.__main__ as pipeline
from mincai import UserError
from mincai.losses import sft_loss
from mincai.model import GPT, GPTConfig, ScalarModel
from mincai.plumbing import data, distributed

LIMIT = 300  # seconds that two processes may take; they need ten on one slow core
CONFIG = GPTConfig(vocab_size=32, block_size=32, n_layer=2, n_head=2, n_embd=16)
# Eight rows; those of rank 0 have 7 answer tokens together, those of rank 1 have 33
ROWS = [
    ([1 + i, 2, 3], [(5 * i + k) % 32 for k in range(n)])
    for i, n in enumerate([1, 9, 2, 8, 3, 7, 1, 9])
]


def tiny(seed=0):
    """The same weights wherever it is called. In float64, since Adam makes steps out of rounding
    where the gradient is 0: that of the keys' biases, which the softmax does not see."""
    torch.manual_seed(seed)
    return GPT(CONFIG).double()


def norms(model):
    return {
        name: float(p.grad.norm()) for name, p in model.named_parameters() if p.grad is not None
    }


def train(micro_batches, steps=5):
    """A toy SFT of this rank's share of ROWS -> losses and gradient norms of every step, and the
    weights."""
    model = tiny()
    net = distributed.wrap(model)
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-2)
    mine = distributed.share(ROWS)
    size = len(mine) // micro_batches
    parts = [data.sft_batch(mine[i : i + size]) for i in range(0, len(mine), size)]
    assert len(parts) == micro_batches
    tokens = sum(int(mask.sum()) for _, _, mask in parts)
    total, losses, grads = distributed.total(tokens), [], []
    for _ in range(steps):
        loss_sum = 0.0
        for k, (ids, targets, mask) in enumerate(parts):
            with distributed.no_sync(net, last=k == len(parts) - 1):
                loss, _ = sft_loss(
                    distributed.bare(net).unembed(net(ids)), targets, mask, total=total
                )
                (loss * distributed.world()).backward()
            loss_sum += float(loss.detach())
        losses.append(distributed.total(loss_sum))
        grads.append(norms(model))
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return {
        "tokens": tokens,
        "losses": losses,
        "grads": grads,
        "weights": torch.cat([p.detach().flatten() for p in model.parameters()]).tolist(),
    }


def one_row():
    """Gradients of a batch of one row: the second rank has none, and takes part with a mask that is
    False."""
    net = distributed.wrap(tiny())
    ids, targets, mask = data.sft_batch(distributed.share(ROWS[1:2]) or ROWS[:1])
    mask = mask & (distributed.rank() == 0)
    total = distributed.total(int(mask.sum()))
    loss, _ = sft_loss(distributed.bare(net).unembed(net(ids)), targets, mask, total=total)
    (loss * distributed.world()).backward()
    return norms(distributed.bare(net))


def frozen():
    """Gradients of a preference model whose lower half is frozen, after forwards that want none."""
    pm = ScalarModel(
        tiny(seed=distributed.rank())
    ).double()  # ranks begin apart: wrap gives all the first one's
    for part in (pm.gpt.wte, pm.gpt.wpe, pm.gpt.h[0]):
        part.requires_grad_(False)
    net = distributed.wrap(pm)
    ids, _, _ = data.sft_batch(distributed.share([ROWS[1], ROWS[7]]))  # of one length
    with torch.no_grad():
        for _ in range(
            1 + distributed.rank()
        ):  # a measurement that ranks do not do alike must not make them wait
            net(ids)
    (net(ids).sum() / 2 * distributed.world()).backward()
    return norms(pm)


def all_of_it(folder):
    """What one of two ranks finds."""
    rank = distributed.rank()
    if distributed.is_main():
        Path(folder, "first").write_text("written by the first rank")
    distributed.barrier()
    sums = {"int": distributed.total(rank + 1), "float": distributed.total(rank + 0.5)}
    return {
        "rank": rank,
        "world": distributed.world(),
        "main": distributed.is_main(),
        "seen": Path(folder, "first").exists(),
        "again": distributed.start("cpu"),
        "shares": [distributed.share(list(range(n))) for n in range(6)],
        "rows": [
            distributed.gather_rows(torch.arange(2 * n).view(n, 2)[rank::2]).tolist()
            for n in range(1, 6)
        ],
        "merged": distributed.merge(["a", "b"][: 1 + rank]),
        "counts": distributed.merge(Counter(x=1, y=rank)),
        "sums": sums,
        "types": [type(x).__name__ for x in sums.values()],
        "train": train(2),
        "one_row": one_row(),
        "frozen": frozen(),
    }


def free_port():
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """What two processes found, started as torchrun starts them: one pair for all tests, for
    starting is what takes time."""
    folder = tmp_path_factory.mktemp("two")
    root = str(Path(__file__).resolve().parents[2])
    common = {
        **os.environ,
        "WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": root,
    }
    ranks = []
    for r in range(2):
        with open(folder / f"{r}.err", "w") as errors:
            ranks.append(
                subprocess.Popen(
                    [sys.executable, __file__, str(folder)],
                    stderr=errors,
                    env={**common, "RANK": str(r), "LOCAL_RANK": str(r)},
                )
            )
    try:
        while None in (codes := [process.poll() for process in ranks]) and not any(
            codes
        ):  # one failed: so will both
            try:
                next(p for p, code in zip(ranks, codes) if code is None).wait(timeout=0.5)
            except subprocess.TimeoutExpired:
                pass
    finally:
        for process in ranks:
            process.kill()
            process.wait()
    assert codes == [0, 0], "\n".join((folder / f"{r}.err").read_text() for r in range(2))
    return [json.loads((folder / f"{r}.json").read_text()) for r in range(2)]


# --- one process --------------------------------------------------------------------------------------------


def test_one_process_does_nothing(monkeypatch):
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    assert distributed.start("cpu") == "cpu" and distributed.start("cuda") == "cuda"
    assert (distributed.rank(), distributed.world()) == (0, 1)
    assert distributed.is_main()
    assert distributed.share([1, 2, 3]) == distributed.merge([1, 2, 3]) == [1, 2, 3]
    distributed.barrier()
    distributed.stop()


def test_what_one_process_does_for_all_meets_nobody(monkeypatch, tmp_path):
    """The loop's stages that the first process does alone: the others wait behind them, and a
    barrier inside would let them go."""
    met, seen = [], []
    monkeypatch.setattr(distributed, "_started", lambda: True)
    monkeypatch.setattr(distributed.dist, "get_rank", lambda: 0)
    monkeypatch.setattr(distributed.dist, "get_world_size", lambda: 2)
    monkeypatch.setattr(distributed.dist, "barrier", lambda: met.append(1))
    monkeypatch.setattr(distributed.dist, "destroy_process_group", lambda: None)
    cfg = pipeline.Config(out=str(tmp_path / "run"), device="cpu", threads=1)
    named = {name: config for name, _, config in pipeline.stages(cfg)}

    def stage(config, *_):
        seen.append(distributed.world())
        before = len(met)
        distributed.barrier()
        assert len(met) - before == distributed.world() - 1

    def one(config):
        stage(config)
        if len(seen) == 3:
            raise UserError("it fails")

    todo = [(name, one if name == "evaluate" else stage, named[name]) for name in named]
    todo = [row for row in todo if row[0] in ("AI feedback", "evaluate")] + [todo[-1]]
    monkeypatch.setattr(pipeline, "stages", lambda cfg: todo)
    monkeypatch.setattr(pipeline, "check", lambda cfg, todo: None)
    monkeypatch.setattr(pipeline, "ONE_WRITES", (one,))
    with pytest.raises(UserError, match="it fails"):
        pipeline.main(cfg)
    assert seen == [2, 1, 1] and distributed.world() == 2


def test_torchrun_with_one_process_does_nothing(monkeypatch):
    for name, value in {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}.items():
        monkeypatch.setenv(name, value)
    assert distributed.start("cuda") == "cuda" and not torch.distributed.is_initialized()


def test_a_sum_over_one_process_is_the_number_itself():
    assert distributed.total(3) == 3 and type(distributed.total(3)) is int
    assert distributed.total(0.1) == 0.1
    rows = distributed.gather_rows(torch.ones(2, requires_grad=True))
    assert not rows.requires_grad  # alone as with others
    assert_close(rows, torch.ones(2))


def test_only_numbers_are_summed():
    for x in (True, torch.ones(1)):
        with pytest.raises(AssertionError, match=f"a {type(x).__name__} cannot be summed"):
            distributed.total(x)


def test_one_process_keeps_the_bare_model():
    model = tiny()
    assert distributed.wrap(model) is model and distributed.bare(model) is model
    with distributed.no_sync(model, last=False):
        pass


def test_what_was_not_shared_cannot_be_gathered(monkeypatch):
    """Two items of rank 1 and none of rank 0: some were dropped on the way, and nobody knows
    which."""
    monkeypatch.setattr(distributed, "world", lambda: 2)
    monkeypatch.setattr(distributed, "_all", lambda items: [items[:0], items])
    with pytest.raises(AssertionError, match=r"not by share\(\): \[0, 2\] items"):
        distributed.gather_rows(torch.ones(2))


def test_incomplete_environment_is_told(monkeypatch):
    for name, value in {
        "RANK": "0",
        "WORLD_SIZE": "2",
        "LOCAL_RANK": "0",
        "MASTER_ADDR": "127.0.0.1",
    }.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("MASTER_PORT", raising=False)
    with pytest.raises(UserError, match="no MASTER_PORT; start with torchrun"):
        distributed.start("cpu")


def test_more_processes_than_gpus_are_told(monkeypatch):
    for name, value in {
        "RANK": "3",
        "WORLD_SIZE": "4",
        "LOCAL_RANK": "3",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "1",
    }.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(
        UserError, match="process 3, from 0, of this machine, which has 2 GPUs; lower torchrun's"
    ):
        distributed.start("cuda")


# --- two processes ------------------------------------------------------------------------------------------


def test_ranks_know_who_they_are(two):
    assert [(r["rank"], r["world"], r["main"]) for r in two] == [(0, 2, True), (1, 2, False)]
    assert all(
        r["seen"] and r["again"] == "cpu" for r in two
    )  # the barrier held; a second start changed nothing


def test_shares_are_disjoint_and_gathered_in_the_old_order(two):
    for n in range(6):
        a, b = (r["shares"][n] for r in two)
        assert sorted(a + b) == list(range(n)) and 0 <= len(a) - len(b) <= 1
        for r in two:
            if n:
                assert r["rows"][n - 1] == [[2 * i, 2 * i + 1] for i in range(n)]


def test_merge_adds_lists_and_counts(two):
    for r in two:
        assert r["merged"] == ["a", "a", "b"] and r["counts"] == {"x": 2, "y": 1}


def test_sums_keep_their_type(two):
    for r in two:
        assert r["sums"] == {"int": 3, "float": 2.0} and r["types"] == ["int", "float"]


def test_two_ranks_train_as_one_process_does(two):
    """Losses, every gradient's norm (Adam's steps alone would not show a gradient that is off by a
    factor) and the weights; the token embedding among them, half of whose gradient comes from
    outside the wrapped forward."""
    whole = train(1)
    assert [r["train"]["tokens"] for r in two] == [7, 33] and whole[
        "tokens"
    ] == 40  # a mean of means would be off
    assert whole["losses"][-1] < whole["losses"][0] - 0.1
    for r in two:
        assert_close(r["train"]["losses"], whole["losses"], atol=1e-5, rtol=0)
        assert_close(r["train"]["grads"], whole["grads"], atol=1e-5, rtol=0)
        assert_close(r["train"]["weights"], whole["weights"], atol=1e-5, rtol=0)
    assert two[0]["train"]["weights"] == two[1]["train"]["weights"]


def test_a_rank_without_rows_adds_nothing(two):
    alone = one_row()
    assert alone["wte.weight"] > 0.1
    for r in two:
        assert_close(r["one_row"], alone, atol=1e-6, rtol=1e-5)


def test_frozen_blocks_and_the_first_ranks_weights(two):
    alone = frozen()
    assert alone["gpt.h.1.mlp.c_fc.weight"] > 0 and not any(
        "h.0." in name or "wte" in name for name in alone
    )
    for r in two:
        assert_close(r["frozen"], alone, atol=1e-6, rtol=1e-5)


if __name__ == "__main__":
    faulthandler.dump_traceback_later(LIMIT, exit=True)  # a rank that waits for ever says where
    distributed.start("cpu")
    found = all_of_it(sys.argv[1])
    Path(sys.argv[1], f"{distributed.rank()}.json").write_text(json.dumps(found))
    distributed.stop()
    distributed.stop()  # nothing is left to leave
