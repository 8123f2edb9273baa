"""Log-probs of given tokens, after prompts or of whole answers, and answers' scores. Token ids in, numbers out.

Prompts are padded on the right here, where nothing is sampled: causal attention then needs no mask. Shapes: B rows, C
channels, V vocabulary.
"""

import torch
from tqdm import tqdm

from mincai.plumbing.data import right_pad
from mincai.losses import gather_logp
from mincai.model import GPT, ScalarModel
from mincai.sample import check_room, chunks


@torch.no_grad()
def next_logp(model: GPT, prompts, ids: list[int], batch_size=32, desc=None) -> torch.Tensor:
    """Log-probs of `ids` as the token after each prompt: (N, len(ids)) float32 on the CPU."""
    assert all(prompts), "an empty prompt"
    out = torch.empty(len(prompts), len(ids))
    lengths = [len(p) for p in prompts]
    for chunk in tqdm(chunks(lengths, batch_size), desc=desc, disable=desc is None):
        check_room(model, [lengths[i] for i in chunk], 0)
        tokens, valid = right_pad([prompts[i] for i in chunk], model.device)  # padding is last: no mask
        rows = torch.arange(len(chunk), device=model.device)
        last = model(tokens)[rows, valid.sum(1) - 1]  # (B, C)
        logp = torch.log_softmax(model.unembed(last), dim=-1)  # (B, V)
        out[chunk] = logp[:, ids].cpu()
    return out


@torch.no_grad()
def answer_logp(model: GPT, prompts, answers, batch_size=32, desc=None) -> list[torch.Tensor]:
    """Log-prob of each answer token after its prompt and the answer so far: a float32 CPU tensor per answer."""
    assert len(prompts) == len(answers), (len(prompts), len(answers))
    out = [None] * len(prompts)
    lengths = [len(p) + len(a) for p, a in zip(prompts, answers)]
    for chunk in tqdm(chunks(lengths, batch_size), desc=desc, disable=desc is None):
        check_room(model, [lengths[i] for i in chunk], 0)
        tokens, _ = right_pad([prompts[i] + answers[i] for i in chunk], model.device)
        places = [(row, len(prompts[i]) + k) for row, i in enumerate(chunk) for k in range(len(answers[i]))]
        row, column = torch.tensor(places, device=model.device).long().reshape(-1, 2).T  # (N,), (N,)
        hidden = model(tokens)[row, column - 1]  # (N, C): token i is predicted at i - 1
        logp = gather_logp(model.unembed(hidden), tokens[row, column]).cpu()
        for i, part in zip(chunk, logp.split([len(answers[i]) for i in chunk])):
            out[i] = part
    return out


@torch.no_grad()
def answer_scores(pm: ScalarModel, prompts, answers, batch_size=32) -> torch.Tensor:
    """The preference model's scores of answers, end of text included, after their prompts: (N,) on the CPU."""
    assert len(prompts) == len(answers), (len(prompts), len(answers))
    out = []
    for i in range(0, len(prompts), batch_size):
        some = list(zip(prompts[i:i + batch_size], answers[i:i + batch_size]))
        ids, valid = right_pad([p + a for p, a in some], pm.gpt.device)
        scores = pm(ids)  # (B, T)
        out.append(scores[torch.arange(len(ids)), valid.sum(1) - 1].cpu())
    return torch.cat(out) if out else torch.zeros(0)
