"""What torchrun needs, so that a script runs as one process or as many. Knows no model, no text.

    python train_sft.py ...                        # one process: nothing in this file does anything
    torchrun --nproc-per-node 8 train_sft.py ...   # eight, each with its share of the rows

Data parallelism: every rank (process) holds the whole model, reads its share of the rows and sums
its gradients with those of the others before a step. What is left out on purpose: sharded weights
and optimiser states (FSDP), which a model of GPT-2's sizes does not need.

Every function that lets ranks meet (gather_rows, merge, total, barrier, wrap, and a backward that
is not under no_sync) has to be called by all of them, in the same order: the one that does not come
is waited for, until TIMEOUT. After an error on one rank torchrun stops the others.
"""

import os
import sys
from contextlib import contextmanager, nullcontext
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from mincai import UserError

# Ranks sample for long without a word, and some end earlier; torch gives up on a GPU in 10 minutes
TIMEOUT = timedelta(hours=3)


_single = False  # see single()


def _started():
    return dist.is_available() and dist.is_initialized()


@contextmanager
def single():
    """While the others wait behind it, this process counts as the only one, and meets nobody."""
    global _single
    before, _single = _single, True
    try:
        yield
    finally:
        _single = before


def start(device: str) -> str:
    """Join the other processes, if torchrun started more than one, and return the device to use.

    'cuda' becomes the rank's own 'cuda:<local rank>'; with one process the device is returned as it
    is. May be called again: every stage does. Raises UserError if torchrun's variables are
    incomplete, or if it started more processes than there are GPUs.
    """
    if int(os.environ.get("WORLD_SIZE", 1)) < 2 or "RANK" not in os.environ:
        return device
    wanted = ("LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    missing = ", ".join(name for name in wanted if name not in os.environ)
    if missing:
        told = f"the environment has RANK and WORLD_SIZE, but no {missing}"
        raise UserError(f"{told}; start with torchrun, or unset RANK to run as one process")
    cuda = torch.device(device).type == "cuda"
    if cuda:
        local, gpus = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
        if local >= gpus:
            told = f"this is process {local}, from 0, of this machine, which has {gpus} GPUs"
            raise UserError(f"{told}; lower torchrun's --nproc-per-node, or give --device cpu")
        device = f"cuda:{local}"
        # before NCCL: it would put every rank's buffers on the first GPU
        torch.cuda.set_device(device)
    if not _started():
        dist.init_process_group("nccl" if cuda else "gloo", timeout=TIMEOUT)
    return device


def stop():
    """Leave the group, if there is one. Does not wait for the others, who may have failed."""
    if _started():
        dist.destroy_process_group()


def rank() -> int:
    """This process's number, from 0; 0 if it is the only one."""
    return dist.get_rank() if world() > 1 else 0


def world() -> int:
    """How many processes there are."""
    return dist.get_world_size() if _started() and not _single else 1


def is_main() -> bool:
    """True on the one process that prints, shows progress bars and writes files."""
    return rank() == 0


def tell(text: str) -> None:
    """A line on stderr, once however many processes there are."""
    if is_main():
        print(text, file=sys.stderr)


def barrier():
    """Wait until all ranks are here: for a file that one of them writes and all of them read."""
    if world() > 1:
        dist.barrier()


def share(items: list) -> list:
    """This rank's items: every world-th one, from its own number on; [] if there are too few."""
    return items[rank() :: world()]


def gather_rows(x):
    """The inverse of `share` for a tensor, whose rows are what this rank made of its items, one for
    one: (b, ...) to (B, ...), in the order before sharing. b differs by at most 1 among ranks, the
    other dimensions do not. On x's device, without a gradient."""
    if world() == 1:
        return x.detach()
    parts = _all(x.detach().cpu().clone())  # a view would bring along all that it is a view of
    sizes, ranks = [len(part) for part in parts], len(parts)
    shared = [len(range(r, sum(sizes), ranks)) for r in range(ranks)]
    assert sizes == shared, f"not by share(): {sizes} items"
    out = torch.empty(sum(sizes), *x.shape[1:], dtype=x.dtype)  # (B, ...)
    for r, part in enumerate(parts):
        out[r::ranks] = part
    return out.to(x.device)


def merge(items):
    """All ranks' items added with +, in the order of the ranks: lists, or Counters."""
    first, *others = _all(items)
    return sum(others, start=first)


def _all(items):
    if world() == 1:
        return [items]
    parts = [None] * world()
    dist.all_gather_object(parts, items)  # pickled by torch: it comes from our own ranks only
    return parts


def total(x: int | float) -> int | float:
    """The sum over ranks, of the same type: for instance of the tokens a loss is divided by."""
    assert type(x) in (int, float), f"a {type(x).__name__} cannot be summed over ranks"
    if world() == 1:
        return x
    # NCCL sends what lies on a GPU only, gloo is used on the CPU
    device = "cuda" if dist.get_backend() == "nccl" else "cpu"
    out = torch.tensor(x, dtype=torch.int64 if type(x) is int else torch.float64, device=device)
    dist.all_reduce(out)
    return out.item()


def wrap(model):
    """The model so that backward sums gradients over ranks, and with rank 0's weights; one process
    gets the model itself.

    DistributedDataParallel divides the sum of the gradients by the number of ranks. A loss that is
    already divided by the tokens of all ranks needs the sum, so multiply it by world():

        loss, _ = sft_loss(logits, targets, mask, total=total(tokens of this rank's whole step))
        (loss * world()).backward()

    A step has one backward that is not under `no_sync`, on every rank; the number of those before
    it may differ. A rank without rows for it must take part all the same: with any row, and a mask
    that is False everywhere. Every parameter has to learn in it, so freeze (requires_grad_) before
    wrapping, and wrap only what learns.

    bare(net).unembed(net(ids)) is right although unembed is no part of net's forward: the token
    embedding is one tensor, reduced when all of its gradient, of look-up and logits, has come.
    """
    if world() == 1:
        return model
    device = next(model.parameters()).device
    ids = [device.index] if device.type == "cuda" else None
    net = DistributedDataParallel(model, device_ids=ids, gradient_as_bucket_view=True)
    # No buffers are sent before a forward: ours are constants, and it would wait for ranks that
    # measure nothing. Set here because versions of torch differ in what the argument is called.
    net.broadcast_buffers = False
    return net


def bare(net):
    """The model inside `wrap`'s: to unembed, generate, save, or run alone."""
    return net.module if isinstance(net, DistributedDataParallel) else net


def no_sync(net, last: bool):
    """A context around one micro-batch's forward and backward: gradients travel with the last."""
    return nullcontext() if last or not isinstance(net, DistributedDataParallel) else net.no_sync()
