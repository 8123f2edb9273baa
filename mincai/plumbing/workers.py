"""Several CPU cores for a small model: chunks of rows go to forked processes of one thread each.

On matrices as small as the tiny model's two threads wait for each other longer than they work, the
more so where something else uses a core. A chunk is computed alike in any process, so what comes of
it does not depend on how many there are.
"""

import multiprocessing
import signal

import torch

from mincai.plumbing import distributed

SMALL = 256  # channels; wider models have matrices that threads can share


def number(model) -> int:
    """How many processes to use for this model: as many as PyTorch has threads, where that is wise."""
    small = model.device.type == "cpu" and model.config.n_embd <= SMALL
    alone = distributed.world() == 1 and "fork" in multiprocessing.get_all_start_methods()
    return torch.get_num_threads() if small and alone else 1


def spread(work, chunks: list, processes: int):
    """work(chunk) of every chunk, in their order. work is called in other processes, and has to give
    what can be pickled, no tensor. What it raises is raised here."""
    processes = min(processes, len(chunks))
    if processes < 2:
        yield from map(work, chunks)
        return
    context = multiprocessing.get_context("fork")  # work and all that it holds are inherited
    turn, found = context.Value("i", 0), context.Queue()

    def run():
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends us
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
    """What a worker has sent; RuntimeError where one was killed, whose chunk would never come."""
    while True:
        try:
            return found.get(timeout=5)
        except multiprocessing.queues.Empty:
            if any(worker.exitcode not in (None, 0) for worker in workers):
                raise RuntimeError(
                    "a worker process was killed; is there too little memory?"
                ) from None
