"""Other answers than the likeliest: go along with an answer, take the runner-up at one token, and let the model go on.

A fine-tuned model is nearly certain, so its samples hardly differ and say nothing of what makes an answer better.
Hot sampling makes them differ everywhere at once. A fork differs by one decision: "that is fine" where the model
would say "that is wrong", another tool, another place; what follows is the model's own continuation at temperature 1.
Pairs of an answer and its forks show a preference model what the difference was. The idea of branching where a model
wavers is old in decoding (diverse beams; Wang & Zhou 2024, 2402.10200, branch at the first token).
"""

import torch

from mincai.data import right_pad
from mincai.sample import generate_batched


@torch.no_grad()
def runners_up(model, prompts, answers, batch_size: int):
    """For each answer: ids (R,) of the likeliest token but the answer's own, and its log-prob (R,), at every place."""
    found = []
    for i in range(0, len(prompts), batch_size):
        some = list(zip(prompts[i:i + batch_size], answers[i:i + batch_size]))
        ids, _ = right_pad([p + a for p, a in some], model.device)
        hidden = model(ids)  # (B, T, C)
        for row, (p, a) in enumerate(some):
            logp = torch.log_softmax(model.unembed(hidden[row, len(p) - 1:len(p) + len(a) - 1]).float(), dim=-1)
            logp.scatter_(1, torch.tensor(a, device=logp.device)[:, None], float("-inf"))  # (R, V)
            best, other = logp.max(dim=1)
            found.append((other.cpu(), best.cpu()))
    return found


def fork(model, prompts, answers, n: int, temperature: float, max_new: int, stop, batch_size=64, generator=None,
         desc=None) -> list[list[list[int]]]:
    """At most n forks of each answer, as token lists like the answers; fewer where an answer is short.

    prompts, answers: lists of token ids. The n places are drawn without replacement with weights p^(1 / temperature),
    p the runner-up's probability: the higher the temperature, the more evenly along the answer. No fork is longer than
    max_new tokens; one that does not end within it is returned without a stop token, as `generate` does.
    """
    heads, owners = [], []
    for i, (other, logp) in enumerate(runners_up(model, prompts, answers, batch_size)):
        weights = torch.softmax(logp / temperature, dim=0)
        places = torch.multinomial(weights, min(n, int((weights > 0).sum())), generator=generator)
        heads += [answers[i][:k] + [int(other[k])] for k in sorted(places.tolist())]
        owners += [i] * len(places)
    out = [list(head) for head in heads]
    quarter = max(1, -(-max_new // 4))
    for q in range(4):  # one room for all heads would let long ones outgrow the context, or leave short ones none
        room = max_new - min(max_new, (q + 1) * quarter)
        mine = [i for i, head in enumerate(heads) if q * quarter < len(head) <= (q + 1) * quarter
                and head[-1] not in stop]
        if room and mine:
            rest = generate_batched(model, [prompts[owners[i]] + heads[i] for i in mine], room, stop, batch_size,
                                    1.0, generator=generator, desc=desc)
            for i, ids in zip(mine, rest):
                out[i] = heads[i] + ids
    found = [[] for _ in prompts]
    for ids, owner in zip(out, owners):
        found[owner].append(ids)
    return found
