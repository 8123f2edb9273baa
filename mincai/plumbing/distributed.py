"""What torchrun needs, so that the same script runs as one process or as many. Knows no model and no text.

    python train_sft.py ...                                   # one process: nothing in this file does anything
    torchrun --nproc-per-node 8 train_sft.py ...              # eight, each with its share of the rows

Data parallelism: every rank (process) holds the whole model, reads its share of the rows and sums its gradients
with those of the others before a step. What is left out on purpose: sharded weights and optimiser states (FSDP),
which a model of GPT-2's sizes does not need.

Every function that lets ranks meet (gather, gather_rows, merge, total, same_everywhere, barrier, wrap, and a
backward that is not under no_sync) has to be called by all of them, in the same order: the one that does not come
is waited for, until TIMEOUT. An error on one rank ends the others: torchrun stops them.
"""

import inspect
import os
from contextlib import nullcontext
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from mincai import UserError

# The ranks sample for a long time without a word, and some end earlier; torch would give up on a GPU after 10 minutes
TIMEOUT = timedelta(hours=3)


# --- processes ------------------------------------------------------------------------------------------------

def _started():
    return dist.is_available() and dist.is_initialized()


def start(device: str) -> str:
    """Join the other processes, if torchrun started more than one, and return the device to use.

    'cuda' becomes the rank's own 'cuda:<local rank>'; with one process the device is returned as it is. May be
    called again: every stage does. Raises UserError if torchrun's variables are incomplete, or if it started more
    processes than there are GPUs.
    """
    if int(os.environ.get("WORLD_SIZE", 1)) < 2 or "RANK" not in os.environ:
        return device
    missing = [name for name in ("LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
    if missing:
        raise UserError(f"the environment has RANK and WORLD_SIZE, but no {', '.join(missing)}; start with torchrun, "
                        f"or unset RANK to run as one process")
    cuda = torch.device(device).type == "cuda"
    if cuda:
        local = int(os.environ["LOCAL_RANK"])
        if local >= torch.cuda.device_count():
            raise UserError(f"this is process {local}, from 0, of this machine, which has {torch.cuda.device_count()} "
                            f"GPUs; lower torchrun's --nproc-per-node, or give --device cpu")
        device = f"cuda:{local}"
        torch.cuda.set_device(device)  # before NCCL: it would put every rank's buffers on the first GPU
    if not _started():
        dist.init_process_group("nccl" if cuda else "gloo", timeout=TIMEOUT)
    return device


def stop():
    """Leave the group; nothing, if there is none. Does not wait for the others, who may have failed."""
    if _started():
        dist.destroy_process_group()


def rank() -> int:
    """This process's number, from 0; 0 if it is the only one."""
    return dist.get_rank() if _started() else 0


def world() -> int:
    """How many processes there are."""
    return dist.get_world_size() if _started() else 1


def is_main() -> bool:
    """True on the one process that prints and writes files."""
    return rank() == 0


def disable_bar() -> bool:
    """For tqdm(disable=...): one progress bar, not one from every rank on top of each other."""
    return not is_main()


def barrier():
    """Wait until all ranks are here: for a file that one of them writes and all of them read."""
    if world() > 1:
        dist.barrier()


# --- rows and numbers ---------------------------------------------------------------------------------------

def share(items: list) -> list:
    """This rank's items: every world-th one, starting at its own number; [] where there are too few for all."""
    return items[rank()::world()]


def gather(items: list) -> list:
    """The inverse of `share`: what every rank made of its items, one for one, in the order before sharing.

    On every rank. For plain Python; tensors go by `gather_rows`, where each row does not bring its whole batch along.
    """
    parts = _all(items)
    out = [None] * _check(parts)
    for r, part in enumerate(parts):
        out[r::len(parts)] = part
    return out


def gather_rows(x):
    """`gather` for a tensor whose rows are this rank's items: (b, ...) to (B, ...), b differing by at most 1.

    The other dimensions are the same on all ranks. On x's device, without a gradient.
    """
    if world() == 1:
        return x.detach()
    parts = _all(x.detach().cpu().clone())  # a view would bring along all that it is a view of
    out = torch.empty(_check(parts), *x.shape[1:], dtype=x.dtype)  # (B, ...)
    for r, part in enumerate(parts):
        out[r::len(parts)] = part
    return out.to(x.device)


def _check(parts):
    """How many items these parts have together, when they are as `share` makes them."""
    sizes, ranks = [len(part) for part in parts], len(parts)
    assert sizes == [len(range(r, sum(sizes), ranks)) for r in range(ranks)], f"not by share(): {sizes} items"
    return sum(sizes)


def merge(items):
    """All ranks' items added with +, in the order of the ranks: lists end to end, the counts of Counters together.

    For what was filtered after sharing, when `gather` no longer knows which item went where.
    """
    first, *others = _all(items)
    for other in others:
        first = first + other
    return first


def _all(items):
    if world() == 1:
        return [items]
    parts = [None] * world()
    dist.all_gather_object(parts, items)  # pickled by torch: it comes from our own ranks only, never from a file
    return parts


def total(x):
    """The sum over ranks of an int, a float or a tensor, as the same type; new, and without a gradient.

    So a loss can be divided by the tokens of all ranks: sft_loss(..., total=total(tokens)).
    """
    tensor = torch.is_tensor(x)
    assert tensor or type(x) in (int, float), f"a {type(x).__name__} cannot be summed over ranks"
    kind = None if tensor else torch.int64 if type(x) is int else torch.float64
    out = x.detach().clone() if tensor else torch.tensor(x, dtype=kind)
    if world() > 1:
        where = out.device
        out = out.to(_device())
        dist.all_reduce(out)
        out = out.to(where)
    return out if tensor else type(x)(out)


def same_everywhere(flag: bool) -> bool:
    """True on every rank if it is True on any: a rank that stops early alone would be waited for by the others."""
    return total(int(flag)) > 0


def _device():
    """Where tensors have to lie to be sent: NCCL knows GPUs only, gloo is used on the CPU."""
    return torch.device("cuda" if dist.get_backend() == "nccl" else "cpu")


# --- gradients ------------------------------------------------------------------------------------------------

def wrap(model):
    """The model so that backward sums gradients over ranks, and with rank 0's weights; itself, if there is one process.

    DistributedDataParallel divides the sum of the gradients by the number of ranks. A loss that is already divided by
    the tokens of all ranks needs the sum, so multiply it by scale() before backward:

        loss, _ = sft_loss(logits, targets, loss_mask, total=total(tokens of this rank's whole step))
        (loss * scale()).backward()

    A step has one backward that is not under `no_sync`, on every rank; the number of those before it may differ. A
    rank without rows for it must take part all the same: with any row, and a mask that is False everywhere. Every
    parameter has to learn in it, so freeze (requires_grad_) before wrapping, and wrap only what learns.

    bare(net).unembed(net(ids)) is right although unembed is no part of net's forward: the token embedding is one
    tensor, whose gradient is reduced once the whole backward, look-up and logits together, has arrived at it.
    """
    if world() == 1:
        return model
    device = next(model.parameters()).device
    # No buffers are sent: ours are constants, and forward would then wait for ranks that measure nothing
    known = inspect.signature(DistributedDataParallel).parameters
    buffers = "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"  # older torch
    return DistributedDataParallel(model, device_ids=[device.index] if device.type == "cuda" else None,
                                   gradient_as_bucket_view=True, **{buffers: False})


def bare(net):
    """The model inside `wrap`'s and torch.compile's: for unembed, generate, saving, and forwards of some ranks only."""
    net = net.module if isinstance(net, DistributedDataParallel) else net
    return getattr(net, "_orig_mod", net)  # what torch.compile made: it would compile anew for each length of a cache


def scale() -> int:
    """What to multiply a loss by that is divided by the tokens of all ranks; see `wrap`."""
    return world()


def no_sync(net, last: bool):
    """A context for one micro-batch, around its forward and its backward: gradients travel with the last one only."""
    return nullcontext() if last or not isinstance(net, DistributedDataParallel) else net.no_sync()
