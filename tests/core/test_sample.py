"""Sampling: the distribution, the stop token, the shared prefill, and log-probs that equal a full
forward."""

import pytest
import torch
from torch.testing import assert_close

from mincai import UserError, sample
from mincai.losses import gather_logp
from mincai.model import GPT, GPTConfig
from mincai.plumbing.logprobs import answer_logp, next_logp
from mincai.sample import generate, generate_batched, generate_then, left_pad, pick

PROMPTS = [[3, 1, 4, 1, 5], [9, 2], [6, 5, 3, 5, 8, 9, 7, 9]]
STOP = {7, 21, 22, 40, 41, 50}  # enough of the 64 ids that rows stop early and at different times


def full_logp(model, prompt, answer, temperature=1.0):
    """Log-probs of the answer's tokens by one plain forward of one row."""
    with torch.no_grad():
        logits = model.unembed(model(torch.tensor([prompt + answer])))[0] / temperature
    return gather_logp(logits[len(prompt) - 1 : -1], torch.tensor(answer))


@pytest.fixture
def counting_gpt():
    """Weights by hand: whatever token it reads, the next one is by far the likeliest (mod 8)."""
    model = GPT(GPTConfig(vocab_size=8, block_size=16, n_layer=1, n_head=1, n_embd=8))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
        model.wte.weight.copy_(torch.eye(8))
        model.ln_f.weight.fill_(1.0)
        # The MLP sees one large and seven negative numbers: its GELU keeps the one, its output
        # moves it on
        model.h[0].ln_2.weight.fill_(1.0)
        model.h[0].mlp.c_fc.weight[:8].copy_(20 * torch.eye(8))
        model.h[0].mlp.c_proj.weight[:, :8].copy_(torch.eye(8).roll(1, dims=0))
    return model


# --- one token ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [1.0, 0.5, 2.0])
def test_sampled_frequencies_follow_the_softmax(seeded, temperature):
    N = 20000
    logits = torch.randn(8, generator=seeded(0))
    uniform = torch.rand(N, generator=seeded(1))
    ids, logp = pick(logits.expand(N, -1), uniform, temperature)
    weights = [pow(2.718281828, x / temperature) for x in logits.tolist()]
    p = torch.tensor(weights) / sum(weights)
    frequency = ids.bincount(minlength=8) / N
    assert (frequency - p).abs().max() < 4 * 0.5 / N**0.5  # four standard errors
    assert ((frequency > 0) <= (p > 0)).all()
    assert_close(logp, p.log()[ids])  # of the distribution sampled, not of the plain softmax


def test_extreme_uniforms_give_possible_tokens():
    """0 and the largest number below 1 must pick no token of probability 0 and none beyond the
    last."""
    logits = torch.full((2, 50), -1e4)
    logits[:, 10:30] = torch.randn(20, generator=torch.Generator().manual_seed(0))
    ids, _ = pick(logits, torch.tensor([0.0, 1 - 2**-24]), 1.0)
    assert ids.tolist() == [10, 29]


def test_temperature_0_takes_the_likeliest_and_scores_it_in_the_plain_softmax():
    logits = torch.tensor([[0.0, 1.0, 3.0], [5.0, 1.0, 0.0]])
    ids, logp = pick(logits, torch.zeros(2), 0)
    assert ids.tolist() == [2, 0]
    assert_close(logp, torch.log_softmax(logits, -1).amax(-1))


# --- many tokens --------------------------------------------------------------------------------------------


def test_a_model_that_counts_counts_on(counting_gpt):
    """A wrong column, position or row order in the decode loop would break the count."""
    samples = generate(counting_gpt, [[1], [0, 0, 5], [2, 3]], 6, stop={0}, temperature=0.0)
    assert samples.lists() == [[2, 3, 4, 5, 6, 7], [6, 7, 0], [4, 5, 6, 7, 0]]


def test_same_seed_same_output_and_rows_differ(tiny_gpt, seeded):
    runs = [generate(tiny_gpt, PROMPTS, 20, (), generator=seeded(s), n=2) for s in (0, 0, 1)]
    assert torch.equal(runs[0].ids, runs[1].ids) and torch.equal(runs[0].logp, runs[1].logp)
    assert not torch.equal(runs[0].ids, runs[2].ids)
    rows = runs[0].lists()
    assert rows[0] != rows[1] and rows[2] != rows[3]  # two answers to one prompt


@pytest.mark.parametrize("temperature", [1.0, 0.0, 1.5])
def test_stop_token_is_included_and_nothing_follows(tiny_gpt, seeded, temperature):
    samples = generate(tiny_gpt, PROMPTS, 24, STOP, temperature, seeded(0), n=8)
    for row, ids, mask, logp in zip(samples.lists(), samples.ids, samples.mask, samples.logp):
        assert mask.tolist() == [t < len(row) for t in range(len(mask))]
        assert not STOP & set(row[:-1]) and (row[-1] in STOP or len(row) == 24)
        assert (ids[len(row) :] == 0).all() and (logp[len(row) :] == 0).all()
    assert samples.ids.shape[1] == max(map(len, samples.lists()))
    assert temperature == 0 or len(set(map(len, samples.lists()))) > 3


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_logp_is_that_of_a_full_forward(tiny_gpt, seeded, temperature):
    """Through the cache, with left padding, n samples a prompt, and rows dropped on the way."""
    samples = generate(tiny_gpt, PROMPTS, 24, STOP, temperature, generator=seeded(3), n=4)
    for k, answer in enumerate(samples.lists()):
        expected = full_logp(tiny_gpt, PROMPTS[k // 4], answer, temperature)
        assert_close(samples.logp[k, : len(answer)], expected, atol=1e-4, rtol=1e-4)


def test_dropping_stopped_rows_changes_no_row(tiny_gpt, seeded):
    """Same random numbers without any stop token: every answer is the same up to where it
    stopped."""
    stopped = generate(tiny_gpt, PROMPTS, 24, STOP, generator=seeded(3), n=6)
    endless = generate(tiny_gpt, PROMPTS, 24, (), generator=seeded(3), n=6)
    assert endless.mask.all() and not stopped.mask.all()
    for short, long in zip(stopped.lists(), endless.lists()):
        assert short == long[: len(short)]


def test_samples_share_the_prefill_and_equal_separate_runs(tiny_gpt, monkeypatch):
    shapes, forward = [], GPT.forward
    monkeypatch.setattr(
        GPT,
        "forward",
        lambda self, ids, *rest: shapes.append(ids.shape) or forward(self, ids, *rest),
    )
    together = generate(tiny_gpt, PROMPTS, 10, STOP, temperature=0.0, n=3).lists()
    assert shapes[0] == (3, 8) and all(T == 1 for _, T in shapes[1:])  # each prompt is read once
    for k, answer in enumerate(together):
        assert answer == generate(tiny_gpt, [PROMPTS[k // 3]], 10, STOP, temperature=0.0).lists()[0]


def test_step_for_graphs_equals_the_eager_loop(tiny_gpt, seeded, monkeypatch):
    """The tensor-only step that CUDA captures, run here without a graph."""
    for temperature, max_new in ((1.0, 24), (0.0, 24), (0.8, 24), (1.0, 40), (1.0, 1)):
        arguments = dict(stop=STOP, temperature=temperature, n=3)
        eager = generate(tiny_gpt, PROMPTS, max_new, generator=seeded(5), **arguments)
        with monkeypatch.context() as patch:
            patch.setattr(sample, "_decode_eager", sample._decode_graph)
            graph = generate(tiny_gpt, PROMPTS, max_new, generator=seeded(5), **arguments)
        assert torch.equal(graph.ids, eager.ids) and torch.equal(graph.mask, eager.mask)
        assert_close(graph.logp, eager.logp, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("decode", ["_decode_eager", "_decode_graph"])
@pytest.mark.parametrize(
    "stop, max_new", [(STOP, 24), (STOP, 3), (range(1, 64), 5), ((), 10), (range(64), 4)]
)
def test_after_an_answer_more_is_read_as_in_a_full_forward(
    tiny_gpt, seeded, monkeypatch, decode, stop, max_new
):
    """In the stop token's place, whenever that came; after a whole answer where none came."""
    plain = generate(tiny_gpt, PROMPTS, max_new, stop, generator=seeded(3), n=4)
    monkeypatch.setattr(sample, "_decode_eager", getattr(sample, decode))
    found = generate(tiny_gpt, PROMPTS, max_new, stop, generator=seeded(3), n=4, then=[9, 8, 7])
    assert (
        plain.after is None and torch.equal(plain.ids, found.ids) and found.after.shape == (12, 64)
    )
    stopped = [answer[-1] in stop for answer in found.lists()]
    assert stop != STOP or max_new != 3 or any(stopped) and not all(stopped)
    for k, answer in enumerate(found.lists()):
        text = PROMPTS[k // 4] + (answer[:-1] if stopped[k] else answer) + [9, 8]
        assert_close(
            torch.log_softmax(found.after[k], 0)[None, 5],
            full_logp(tiny_gpt, text + [7], [5]),
            atol=1e-4,
            rtol=1e-4,
        )


def test_what_follows_many_answers_comes_in_the_order_of_the_prompts(tiny_gpt):
    settings, prompts = (
        dict(batch_size=2, then=[9, 8], of=[5, 30]),
        PROMPTS + [[1] * 3, [2] * 3, [3]],
    )
    assert [len(x) for x in generate_then(tiny_gpt, [], 8, STOP, **settings)] == [0, 0]
    answers, logp = generate_then(tiny_gpt, prompts, 8, STOP, **settings)
    assert logp.shape == (6, 2)
    assert answers == generate_batched(tiny_gpt, prompts, 8, STOP, temperature=0.0)
    for k, answer in enumerate(answers):
        text = prompts[k] + [i for i in answer if i not in STOP] + [9, 8]
        for column, token in enumerate((5, 30)):
            assert_close(
                logp[k, column, None], full_logp(tiny_gpt, text, [token]), atol=1e-4, rtol=1e-4
            )


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_cuda_graph_equals_the_cpu(tiny_gpt, seeded):
    cpu = generate(tiny_gpt, PROMPTS, 40, STOP, generator=seeded(5), n=3)
    gpu = generate(tiny_gpt.cuda(), PROMPTS, 40, STOP, generator=seeded(5), n=3)
    assert torch.equal(gpu.ids.cpu(), cpu.ids)
    assert_close(gpu.logp.cpu(), cpu.logp, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("n", [1, 3])
def test_what_is_sampled_does_not_depend_on_the_batch(tiny_gpt, n):
    """Nor on which prompts share one: each row has its own random numbers."""
    prompts = [[5] * length for length in (3, 9, 1, 4, 4, 7, 2)]
    found = [
        generate_batched(
            tiny_gpt,
            prompts,
            8,
            STOP,
            batch_size=size,
            n=n,
            generator=torch.Generator().manual_seed(3),
        )
        for size in (1, 4, 64)
    ]
    assert found[0] == found[1] == found[2] and len({tuple(row) for row in found[0]}) > 1


def test_batched_answers_come_in_the_order_of_the_prompts(tiny_gpt):
    prompts = [[k + 1] * (1 + k % 5) for k in range(11)]
    answers = generate_batched(tiny_gpt, prompts, 8, STOP, batch_size=6, temperature=0.0, n=2)
    for k, answer in enumerate(answers):
        assert answer == generate(tiny_gpt, [prompts[k // 2]], 8, STOP, temperature=0.0).lists()[0]
    assert generate_batched(tiny_gpt, [], 8, STOP) == []


def test_left_pad_by_hand():
    ids, valid = left_pad([[5, 6, 7], [8]])
    assert ids.tolist() == [[5, 6, 7], [0, 0, 8]]
    assert valid.tolist() == [[True] * 3, [False, False, True]]


def test_prompt_too_long_names_both_numbers(tiny_gpt):
    generate(tiny_gpt, [[1] * 54], 10, ())  # exactly full
    with pytest.raises(UserError, match="55 tokens and 10 more make 65, .* at most 64"):
        generate(tiny_gpt, [[1], [1] * 55], 10, ())
    generate(tiny_gpt, [[1] * 54], 6, (), then=[1] * 4)
    with pytest.raises(UserError, match="55 tokens and 10 more"):
        generate(tiny_gpt, [[1] * 55], 6, (), then=[1] * 4)
    with pytest.raises(UserError, match="65.* 64"):
        next_logp(tiny_gpt, [[1] * 65], [1])
    with pytest.raises(UserError, match="65.* 64"):
        answer_logp(tiny_gpt, [[1] * 60], [[1] * 5])


# --- log-probs of given tokens ------------------------------------------------------------------------------


def test_next_logp_equals_a_full_forward(tiny_gpt):
    prompts = PROMPTS + [[k] * 3 for k in range(5)]
    found = next_logp(tiny_gpt, prompts, [11, 60], batch_size=3)
    expected = torch.stack(
        [torch.cat([full_logp(tiny_gpt, p, [i]) for i in (11, 60)]) for p in prompts]
    )
    assert found.shape == (8, 2)
    assert_close(found, expected, atol=1e-4, rtol=1e-4)


def test_answer_logp_equals_a_full_forward(tiny_gpt):
    answers = [[1, 2, 3], [30], [4] * 20]
    for found, prompt, answer in zip(
        answer_logp(tiny_gpt, PROMPTS, answers, batch_size=2), PROMPTS, answers
    ):
        assert_close(found, full_logp(tiny_gpt, prompt, answer), atol=1e-4, rtol=1e-4)


def test_logp_of_samples_equals_answer_logp(tiny_gpt, seeded):
    """What PPO's ratio rests on: sampling and scoring see the same distribution."""
    samples = generate(tiny_gpt, PROMPTS, 24, STOP, generator=seeded(0), n=4)
    prompts = [p for p in PROMPTS for _ in range(4)]
    for k, logp in enumerate(answer_logp(tiny_gpt, prompts, samples.lists())):
        assert_close(samples.logp[k, : len(logp)], logp, atol=1e-4, rtol=1e-4)


def test_an_empty_answer_has_no_logp(tiny_gpt):
    assert [len(x) for x in answer_logp(tiny_gpt, PROMPTS, [[], [1], []], batch_size=1)] == [
        0,
        1,
        0,
    ]


@pytest.mark.parametrize("decode", ["_decode_eager", "_decode_graph"])
def test_what_all_prompts_begin_with_is_read_once_and_changes_nothing(
    tiny_gpt, seeded, monkeypatch, decode
):
    """Rows of uneven length behind a header of five: the same tokens and log-probs as when each
    reads it."""
    monkeypatch.setattr(sample, "_decode_eager", getattr(sample, decode))
    prompts = [[8, 3, 9, 9, 4, *rest] for rest in ([5], [6, 7, 1, 2], [5, 5], [1])]
    assert sample.shared_prefix(prompts) == 0  # not worth it
    asked = dict(temperature=1.0, n=2, then=[9, 8])
    whole = generate(tiny_gpt, prompts, 12, STOP, generator=seeded(3), **asked)
    logp = next_logp(tiny_gpt, prompts, [1, 2, 3], 4)
    rows, forward = [], tiny_gpt.forward
    monkeypatch.setattr(
        tiny_gpt, "forward", lambda ids, *a, **k: rows.append(ids.shape) or forward(ids, *a, **k)
    )
    monkeypatch.setattr(sample, "SHARED", 3)
    assert sample.shared_prefix(prompts) == 5 and sample.shared_prefix([[1, 2, 3, 4, 5]] * 2) == 4
    once = generate(tiny_gpt, prompts, 12, STOP, generator=seeded(3), **asked)
    assert rows[0] == (1, 5) and rows[1] == (
        4,
        4,
    )  # the header for all, then what is left of the longest
    assert once.lists() == whole.lists()
    assert_close(once.logp, whole.logp, atol=1e-4, rtol=0)
    assert_close(once.after, whole.after, atol=1e-4, rtol=1e-4)
    assert_close(next_logp(tiny_gpt, prompts, [1, 2, 3], 4), logp, atol=1e-4, rtol=0)
