"""Work dealt out to processes and threads: in order, the same as alone, and its errors come
home."""

import os
import signal
import threading
import time
from pathlib import Path

import pytest
import torch

from mincai import UserError
from mincai.model import ScalarModel
from mincai.plumbing import workers
from mincai.plumbing.logprobs import answer_logp, answer_scores
from mincai.sample import generate_batched, generate_then


@pytest.fixture
def cores():
    """A function that says how many to use; one again afterwards."""
    yield workers.use
    workers.use(1)


def test_chunks_come_in_order_from_several_processes():
    def work(n):
        time.sleep(0.02 * (n % 3))  # later ones are ready first
        return n * n, os.getpid(), torch.get_num_threads()

    found = list(workers.spread(work, list(range(8)), 3))
    assert [square for square, _, _ in found] == [n * n for n in range(8)]
    assert os.getpid() not in {pid for _, pid, _ in found} and {
        threads for *_, threads in found
    } == {1}
    alone = list(workers.spread(work, [5], 3))  # one chunk needs no process
    assert alone[0][:2] == (25, os.getpid())


def test_what_a_process_raises_is_raised_here():
    def work(n):
        if n == 2:
            raise UserError("two is too many")
        return n

    with pytest.raises(UserError, match="two is too many"):
        list(workers.spread(work, list(range(5)), 2))


def test_a_process_that_is_killed_is_told(monkeypatch):
    monkeypatch.setattr(workers, "PATIENCE", 0.5)

    def work(n):
        if n == 1:
            os._exit(9)
        time.sleep(0.2)
        return n

    with pytest.raises(UserError, match="was killed.*; lower --batch-size or --threads"):
        list(workers.spread(work, list(range(3)), 2))


def test_samples_do_not_depend_on_the_number_of_cores(tiny_gpt, seeded, cores):
    prompts, found = [[1 + n % 9] * (1 + n % 5) for n in range(30)], []
    for n in (1, 2, 3):
        cores(n)
        drawn = generate_batched(tiny_gpt, prompts, 12, {7, 9}, 8, generator=seeded(3), n=2)
        texts, logp = generate_then(tiny_gpt, prompts, 12, {7, 9}, 8, [4, 5], [1, 2])
        known = [part.tolist() for part in answer_logp(tiny_gpt, prompts, texts, 8)]
        torch.manual_seed(0)
        scores = answer_scores(ScalarModel(tiny_gpt), prompts, texts, 8).tolist()
        found.append((drawn, texts, logp.tolist(), known, scores))
    assert found[0] == found[1] == found[2] and len(set(map(tuple, found[0][0]))) > 20


def test_tasks_side_by_side_keep_the_callers_modes(tiny_gpt, cores):
    def modes():
        return torch.is_grad_enabled(), torch.is_autocast_enabled("cpu")

    for n in (1, 2):
        cores(n)
        assert workers.beside(tiny_gpt, lambda: 1, lambda: 2) == [1, 2]
        for grad in (True, False):
            for half in (True, False):
                with (
                    torch.set_grad_enabled(grad),
                    torch.autocast("cpu", torch.bfloat16, enabled=half),
                ):
                    assert workers.beside(tiny_gpt, modes, modes) == [(grad, half)] * 2


def test_threads_stay_and_a_forked_process_has_its_own(tiny_gpt, cores):
    """One that ends while a process is forked can leave it a lock that is taken for ever."""
    cores(2)

    def who():
        time.sleep(0.02)
        return threading.current_thread()

    first = workers.beside(tiny_gpt, who, who)
    assert len(set(first)) == 2 and all(thread.is_alive() for thread in first)
    workers.beside(tiny_gpt, who, who)
    assert all(thread.is_alive() for thread in first)

    def work(n):
        return sum(workers.beside(tiny_gpt, lambda: n, lambda: 2 * n))

    assert list(workers.spread(work, [1, 2, 3], 2)) == [3, 6, 9]


def test_an_error_in_a_thread_comes_home_when_all_have_ended(tiny_gpt, cores):
    cores(2)
    ended = []

    def slow():
        time.sleep(0.1)
        ended.append(True)

    with pytest.raises(ZeroDivisionError):
        workers.beside(tiny_gpt, lambda: 1 / 0, slow)
    assert ended


def test_processes_are_ended_without_a_word(capfd):
    """Whoever reads only the first result ends the others; the caller's own way to be ended is not
    theirs."""

    def end(number, frame):
        raise KeyboardInterrupt

    def work(n):
        time.sleep(0.05 if n == 0 else 20)
        return n

    before = signal.signal(signal.SIGTERM, end)
    try:
        found = workers.spread(work, list(range(3)), 2)
        assert next(found) == 0
        found.close()
    finally:
        signal.signal(signal.SIGTERM, before)
    assert capfd.readouterr().err == ""


def test_workers_end_when_their_parent_was_killed(tmp_path):
    def work(n):
        (tmp_path / str(os.getpid())).touch()
        time.sleep(0.05)
        return n

    process = os.fork()
    if not process:
        try:
            next(workers.spread(work, list(range(2000)), 2))
        finally:
            os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(process, 0)
    numbers, until = [int(path.name) for path in tmp_path.iterdir()], time.time() + 10
    assert numbers
    while any(Path(f"/proc/{number}").exists() for number in numbers) and time.time() < until:
        time.sleep(0.1)
    assert time.time() < until
