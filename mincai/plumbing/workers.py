"""Several CPU cores for a small model: its work is dealt out in pieces, each to one thread.

On matrices as small as the tiny model's two threads of one product wait for each other longer than
they work, the more so where something else uses a core. So PyTorch gets one thread, chunks of rows
that are only read go to forked processes (`spread`), and networks that learn or score side by side
(`beside`), or the halves of a batch that one learns from (`add_up`), to threads of their own. A
piece is computed alike wherever it is: what comes of it does not depend on the number of cores.
"""

import multiprocessing
import os
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor, wait
from functools import partial

import torch

from mincai import UserError
from mincai.plumbing import data, distributed

PATIENCE = 5  # seconds, after which it is looked whether workers live
SMALL = 256  # channels; wider models have matrices that threads can share
_cores = 1


def _new_threads() -> None:
    """Threads that stay: one that ends gives back the memory of its matrix products, and a process
    forked meanwhile (MKL's lock is then taken, for ever) would wait in its first product."""
    global _threads
    _threads = ThreadPoolExecutor(8)


_new_threads()
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_new_threads)  # threads are not inherited


def use(cores: int) -> None:
    """Let small models use this many cores from now on, as torch.set_num_threads does for
    others."""
    global _cores
    _cores = cores
    torch.set_num_threads(1)


def fit(model) -> None:
    """One thread for PyTorch if this model is a small one, else as many as there are cores to
    use."""
    torch.set_num_threads(1 if _small(model) else _cores)


def number(model) -> int:
    """How many pieces of this model's work may go on at once."""
    return _cores if _small(model) and distributed.world() == 1 else 1


def _small(model) -> bool:
    return model.device.type == "cpu" and model.config.n_embd <= SMALL


def beside(model, *tasks) -> list:
    """What each of these functions gives, called at once if cores are there. They share memory, and
    none may change what another uses."""
    if number(model) < 2:
        return [task() for task in tasks]
    # autocast and no_grad are each thread's own
    grad, on = torch.is_grad_enabled(), torch.is_autocast_enabled("cpu")

    def call(task):
        with torch.set_grad_enabled(grad), torch.autocast("cpu", torch.bfloat16, enabled=on):
            return task()

    running = [_threads.submit(call, task) for task in tasks]
    wait(running)
    return [task.result() for task in running]


def add_up(model, net, rows, micro_batch, loss, precision) -> dict[str, float]:
    """Adds the gradient of a batch to that of `net`, which wraps or holds the model, and gives the
    metrics' sums over all pieces and processes. loss(some rows, whether they count) -> (their part
    of the loss, of the metrics), called in the context that precision() makes; micro_batch: the
    most rows in a piece, 0 sets no limit.

    A small model has its batch in halves on any number of cores. They go side by side, and their
    gradients, empty before, add up to the same bits whichever is first: a + b is b + a. More pieces
    would have an order, so they go one after another.
    """
    parts = data.micro_batches(rows, micro_batch, 2 if _small(model) else 1)

    def learn(k):
        with distributed.no_sync(net, last=k == len(parts) - 1):
            with precision():
                part, metrics = loss(*parts[k])
            (part * distributed.world()).backward()
        return metrics

    tasks = [partial(learn, k) for k in range(len(parts))]
    found = beside(model, *tasks) if len(tasks) == 2 else [task() for task in tasks]
    return {name: distributed.total(sum(float(part[name]) for part in found)) for name in found[0]}


def spread(work, chunks: list, processes: int):
    """work(chunk) of every chunk, in their order. work is called in other processes, and has to
    give what can be pickled, no tensor. What it raises is raised here."""
    processes = min(processes, len(chunks))
    if processes < 2 or "fork" not in multiprocessing.get_all_start_methods():
        yield from map(work, chunks)
        return
    context = multiprocessing.get_context("fork")  # work and all that it holds are inherited
    turn, found = context.Value("i", 0), context.Queue()
    parent = os.getpid()

    def follow():
        """Ends a worker whose parent was killed: what it finds out is asked by nobody."""
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)

    def run():
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends us, by SIGTERM
        signal.signal(signal.SIGTERM, signal.SIG_DFL)  # not as it would itself be ended
        threading.Thread(target=follow, daemon=True).start()
        torch.set_num_threads(1)
        while True:
            with turn.get_lock():
                i = turn.value
                turn.value += 1
            if i >= len(chunks):
                return
            try:
                found.put((i, work(chunks[i]), None))
            except Exception as error:
                found.put((i, None, error))

    workers = [context.Process(target=run, daemon=True) for _ in range(processes)]
    try:
        for worker in workers:
            worker.start()
        early = {}
        for i in range(len(chunks)):
            while i not in early:
                k, result, error = _next(found, workers)
                if error is not None:
                    raise error
                early[k] = result
            yield early.pop(i)
    finally:
        for worker in workers:
            worker.terminate()
            worker.join()


def _next(found, workers):
    """What a worker has sent; UserError where one was killed, whose chunk would never come."""
    while True:
        try:
            return found.get(timeout=PATIENCE)
        except multiprocessing.queues.Empty:
            if any(worker.exitcode not in (None, 0) for worker in workers):
                told = "a worker process was killed, as the system does when memory runs out"
                raise UserError(f"{told}; lower --batch-size or --threads") from None
