"""Log-probs of given tokens, after prompts or of whole answers, and answers' scores. Token ids in,
numbers out.

Answers whose every token is read are padded on the right, where causal attention needs no mask;
those of which the last one is, on the left. Shapes: B rows, C channels, V vocabulary.
"""

import torch

from mincai.losses import gather_logp
from mincai.model import GPT, ScalarModel, attention_mask, positions_of
from mincai.plumbing import distributed, workers
from mincai.plumbing.data import right_pad
from mincai.sample import by_chunks, check_room, left_pad, read


@torch.no_grad()
def next_logp(model: GPT, prompts, ids: list[int], batch_size=32, journal=None) -> torch.Tensor:
    """Log-probs of `ids` as the token after each prompt: (N, len(ids)) float32 on the CPU.
    journal: see sample.by_chunks."""
    assert all(prompts), "an empty prompt"
    lengths = [len(p) for p in prompts]

    def score(chunk):
        check_room(model, [lengths[i] for i in chunk], 0)
        _, _, logits = read(model, [prompts[i] for i in chunk], 0)  # (B, V)
        return torch.log_softmax(logits, dim=-1)[:, ids].tolist()

    found = by_chunks(score, lengths, batch_size, model, journal=journal)
    return torch.tensor(found).reshape(-1, len(ids))


@torch.no_grad()
def answer_logp(model: GPT, prompts, answers, batch_size=32) -> list[torch.Tensor]:
    """Log-prob of each answer token after its prompt and the answer so far: a float32 CPU tensor
    per answer."""
    assert len(prompts) == len(answers), (len(prompts), len(answers))
    lengths = [len(p) + len(a) for p, a in zip(prompts, answers)]

    def score(chunk):
        check_room(model, [lengths[i] for i in chunk], 0)
        tokens, _ = right_pad([prompts[i] + answers[i] for i in chunk], model.device)
        spans = [range(len(prompts[i]), lengths[i]) for i in chunk]  # columns of the answers
        places = [(row, column) for row, span in enumerate(spans) for column in span]
        row, column = torch.tensor(places, device=model.device).long().reshape(-1, 2).T  # (N,) both
        hidden = model(tokens)[row, column - 1]  # (N, C): token i is predicted at i - 1
        logp = gather_logp(model.unembed(hidden), tokens[row, column])
        return [piece.tolist() for piece in logp.split([len(answers[i]) for i in chunk])]

    return [torch.tensor(logp) for logp in by_chunks(score, lengths, batch_size, model)]


def end_scores(pm: ScalarModel, rows) -> torch.Tensor:
    """The preference model's score of each row of token ids, read at its last one: (B,)."""
    ids, valid = left_pad(rows, distributed.bare(pm).gpt.device)  # (B, T): all end in one column
    how = dict(positions=positions_of(valid), mask=attention_mask(valid))
    return pm(ids, **how, start=ids.shape[1] - 1).squeeze(1)


def answer_scores(pm: ScalarModel, prompts, answers, batch_size=32) -> torch.Tensor:
    """The scores of answers, end of text included, after their prompts: (N,) on the CPU."""
    assert len(prompts) == len(answers), (len(prompts), len(answers))
    return row_scores(pm, [prompt + answer for prompt, answer in zip(prompts, answers)], batch_size)


@torch.no_grad()
def row_scores(pm: ScalarModel, rows, batch_size) -> torch.Tensor:
    """What end_scores gives for any number of rows: (N,) on the CPU."""
    parts = [rows[i : i + batch_size] for i in range(0, len(rows), batch_size)]

    def score(some):
        return end_scores(pm, some).cpu().numpy()

    found = workers.spread(score, parts, workers.number(pm.gpt))
    return torch.tensor([number for some in found for number in some.tolist()])


def pair_scores(pm: ScalarModel, pairs) -> tuple[torch.Tensor, torch.Tensor]:
    """Scores (B,) of these pairs' answers (A) and of their answers (B), from one forward over
    both."""
    scores = end_scores(pm, [pair.a for pair in pairs] + [pair.b for pair in pairs])
    return scores[: len(pairs)], scores[len(pairs) :]
