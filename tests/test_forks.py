"""A fork follows the answer up to one place, takes the second choice there, and is the model's own from there on."""

import pytest
import torch

from mincai import checkpoint, constitution, data, feedback
from mincai.forks import fork, runners_up
from mincai.sample import generate_batched
from mincai.tokenizer import load_tokenizer


@pytest.fixture
def setting(tiny_base):
    model, tokenizer = checkpoint.load(tiny_base), load_tokenizer(tiny_base)
    with torch.no_grad():
        torch.manual_seed(0)
        for parameter in model.parameters():  # far from uniform, so that a slip shows
            parameter.add_(0.3 * torch.randn_like(parameter))
    prompts = [tokenizer.encode(constitution.dialogue(f"how do i {x} ?")) for x in ("burn a lamp", "sell a map")]
    answers = [row + [tokenizer.eot] for row in ([5, 6, 7, 8, 9], [11, 12, 13])]
    return model, tokenizer, prompts, answers


def test_the_runner_up_is_the_best_of_all_other_tokens(setting):
    model, _, prompts, answers = setting
    for batch_size in (1, 2):
        for prompt, answer, (other, logp) in zip(prompts, answers, runners_up(model, prompts, answers, batch_size)):
            assert len(other) == len(logp) == len(answer)
            for k, token in enumerate(answer):
                every = torch.log_softmax(model.unembed(model(torch.tensor([prompt + answer[:k]])))[0, -1], 0)
                every = every.detach().clone()
                every[token] = float("-inf")
                assert int(every.argmax()) == int(other[k])
                assert float(every.max()) == pytest.approx(float(logp[k]), abs=1e-4)


def test_a_fork_leaves_its_answer_at_one_place_and_goes_on_by_itself(setting):
    model, tokenizer, prompts, answers = setting
    seconds = [other.tolist() for other, _ in runners_up(model, prompts, answers, 2)]
    found = fork(model, prompts, answers, 3, 2.0, 12, {tokenizer.eot}, generator=torch.Generator().manual_seed(0))
    assert [len(some) for some in found] == [3, 3]
    for answer, second, some in zip(answers, seconds, found):
        places = []
        for ids in some:
            k = next(k for k, (x, y) in enumerate(zip(ids, answer)) if x != y)
            assert ids[k] == second[k] and 0 < len(ids) <= 12
            assert tokenizer.eot not in ids[:-1]
            places.append(k)
        assert len(set(places)) == 3  # without replacement
    assert len(fork(model, prompts, answers, 99, 2.0, 12, {tokenizer.eot})[1]) == len(answers[1])  # all places there are


def test_low_temperature_forks_where_the_model_wavers_most(setting):
    model, tokenizer, prompts, answers = setting
    best = [int(logp.argmax()) for _, logp in runners_up(model, prompts, answers, 2)]
    for seed in range(5):
        found = fork(model, prompts, answers, 1, 0.01, 12, {tokenizer.eot}, generator=torch.Generator().manual_seed(seed))
        for answer, (ids,), k in zip(answers, found, best):
            assert ids[:k] == answer[:k] and ids[k] != answer[k]


def test_long_heads_stay_within_the_context_and_the_limit(setting):
    model, tokenizer, prompts, _ = setting
    room = model.config.block_size - len(prompts[0])
    answer = list(range(3, 3 + room - 1)) + [tokenizer.eot]  # as long as an answer can be
    found, = fork(model, prompts[:1], [answer], 6, 50.0, room, {tokenizer.eot},
                  generator=torch.Generator().manual_seed(1))
    assert len(found) == 6 and max(map(len, found)) <= room


def test_the_stage_pairs_an_answer_with_its_forks(tiny_base, tmp_path, monkeypatch):
    """One plain sample and three forks a prompt; who forks is the fine-tuned model alone."""
    rows = [r for r in data.read_jsonl(tiny_base / "prompts.jsonl") if r["kind"] == "harmful"][:3]
    data.write_jsonl(tmp_path / "prompts.jsonl", rows)
    tokenizer, asked = load_tokenizer(tiny_base), []

    def forked(model, prompts, answers, n, *_, **__):
        asked.append((n, [tokenizer.decode(a[:-1]) for a in answers]))
        return [[tokenizer.encode(f" sorry {k}") + [tokenizer.eot] for k in "abc"] for _ in prompts]

    def generate(model, prompts, max_new, stop, batch_size, *heat, n=0, **more):
        if not n:
            return generate_batched(model, prompts, max_new, stop, batch_size, **more)
        return [tokenizer.encode(" sure .") + [tokenizer.eot]] * n * len(prompts)
    monkeypatch.setattr(feedback, "fork", forked)
    monkeypatch.setattr(feedback, "generate_batched", generate)
    feedback.main(feedback.Config(model=str(tiny_base), judge=str(tiny_base), prompts=str(tmp_path / "prompts.jsonl"),
                                  out=str(tmp_path / "out.jsonl"), samples=4, forks=12, base_samples=0, pairs=0,
                                  max_new=12, device="cpu", threads=1))
    assert asked == [(3, [" sure ."] * 3)]
    for row in rows:
        pairs = [{r["a"], r["b"]} for r in data.read_jsonl(tmp_path / "out.jsonl") if r["prompt_id"] == row["id"]]
        assert len(pairs) == 6 and {"sure .", "sorry a"} in pairs and {"sorry b", "sorry c"} in pairs
