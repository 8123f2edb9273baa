"""GPT-2's transformer, its KV cache, and a scalar head. Knows no loss and no text.

Radford et al. 2019: pre-LayerNorm blocks, learned positions, tanh GELU, logits from the transposed
token embedding (or, untied, from a matrix of their own). Parameter names are GPT-2's (wte, wpe, h,
ln_f, c_attn, c_proj, ...), so that reading published weights is one loop (checkpoint.py). What is
left out on purpose: dropout. PPO compares log-probs of the same tokens under the same weights and
needs the ratio to be exactly 1 on its first minibatch.

Shapes: B batch, T time (queries), S keys that a query may see, C channels, V vocabulary, nh heads,
hs head size.
"""

from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F

from mincai import UserError


@dataclass(frozen=True)
class GPTConfig:
    vocab_size: int = 50257
    block_size: int = 1024  # how many positions wpe holds
    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768
    layer_norm_epsilon: float = 1e-5
    tied: bool = True  # logits by the token embedding; False: by a matrix of their own


class KVCache:
    """Keys and values of every layer, preallocated; the caller owns it and passes it in.

    k, v: (n_layer, B, nh, length, hs). `seen` counts the columns already filled. Columns are filled
    left to right for all rows together; which of them a row may look at is said by the mask given
    to `GPT.forward`.
    """

    def __init__(
        self, config: GPTConfig, batch: int, length: int, device=None, dtype=torch.float32
    ):
        shape = (config.n_layer, batch, config.n_head, length, config.n_embd // config.n_head)
        self.k = torch.zeros(shape, device=device, dtype=dtype)
        self.v = torch.zeros(shape, device=device, dtype=dtype)
        self.seen = 0

    def keep(self, rows: torch.Tensor) -> None:
        """Keep these rows only (or repeat them): rows (B',) long."""
        self.k, self.v = self.k[:, rows], self.v[:, rows]


class Attention(nn.Module):
    def __init__(self, config: GPTConfig):
        super().__init__()
        self.n_head = config.n_head
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd)

    def forward(self, x, mask, cache, layer, columns, start):
        B, T, C = x.shape
        q, k, v = (
            t.view(B, T, self.n_head, C // self.n_head).transpose(1, 2)  # (B, nh, T, hs)
            for t in self.c_attn(x).split(C, dim=2)
        )
        if cache is not None:
            if columns is None:  # eager: the next T columns, and only as many keys as are filled
                end = cache.seen + T
                cache.k[layer, :, :, cache.seen : end] = k
                cache.v[layer, :, :, cache.seen : end] = v
                k, v = cache.k[layer, :, :, :end], cache.v[layer, :, :, :end]  # (B, nh, S, hs)
            else:  # captured in a CUDA graph: nothing may depend on a Python number that changes
                # Autocast may have changed their type
                cache.k[layer].index_copy_(2, columns, k.to(cache.k.dtype))
                cache.v[layer].index_copy_(2, columns, v.to(cache.v.dtype))
                k, v = cache.k[layer], cache.v[layer]
        if start:
            if mask is None:
                mask = torch.ones(T, T, dtype=torch.bool, device=x.device).tril()
            q, mask = q[:, :, start:], mask[..., start:, :]
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None)
        return self.c_proj(y.transpose(1, 2).reshape(B, T - start, C))


class MLP(nn.Module):
    def __init__(self, config: GPTConfig):
        super().__init__()
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd)
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd)

    def forward(self, x):
        # GPT-2 was trained with the tanh form; the exact form moves the logits (Hendrycks & Gimpel
        # 2016)
        return self.c_proj(F.gelu(self.c_fc(x), approximate="tanh"))


class Block(nn.Module):
    def __init__(self, config: GPTConfig):
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd, eps=config.layer_norm_epsilon)
        self.attn = Attention(config)
        self.ln_2 = nn.LayerNorm(config.n_embd, eps=config.layer_norm_epsilon)
        self.mlp = MLP(config)

    def forward(self, x, mask, cache, layer, columns, start):
        x = x[:, start:] + self.attn(self.ln_1(x), mask, cache, layer, columns, start)
        return x + self.mlp(self.ln_2(x))


class GPT(nn.Module):
    def __init__(self, config: GPTConfig):
        super().__init__()
        assert config.n_embd % config.n_head == 0, (config.n_embd, config.n_head)
        self.config = config
        self.tokens = config.vocab_size  # ids that stand for something; rows after them do not
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        self.wpe = nn.Embedding(config.block_size, config.n_embd)
        self.h = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.ln_f = nn.LayerNorm(config.n_embd, eps=config.layer_norm_epsilon)
        self.lm_head = (
            None if config.tied else nn.Linear(config.n_embd, config.vocab_size, bias=False)
        )
        self.apply(self._init)
        for name, p in self.named_parameters():
            # Scaled by 1/sqrt(residual layers): GPT-2, section 2.3
            if name.endswith("c_proj.weight"):
                p.data /= (2 * config.n_layer) ** 0.5

    def _init(self, module):
        if isinstance(module, (nn.Linear, nn.Embedding)):
            # GPT-2's 0.02 at its width of 768; a narrow model starts as lively as a wide one
            nn.init.normal_(module.weight, std=0.02 * (768 / self.config.n_embd) ** 0.5)
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)

    @property
    def device(self):
        return self.wte.weight.device

    def forward(self, ids, positions=None, mask=None, cache=None, columns=None, start=0):
        """Token ids (B, T) to hidden states (B, T - start, C), of the columns from `start` on;
        `unembed` makes logits of them.

        positions (B, T): default 0..T-1, shifted by what the cache holds. mask (B, T, S) bool, True
        where query t may look at key s; None means causal over these T tokens, which is right for
        right-padded rows and an empty cache. columns (T,) long: where to write in the cache, for
        CUDA graphs only; then S is all of its length.
        """
        B, T = ids.shape
        fresh = cache is None or cache.seen == 0 and columns is None
        assert fresh or positions is not None and mask is not None, (
            "a filled cache needs positions and mask"
        )
        if positions is None:
            assert T <= self.config.block_size, (T, self.config.block_size)
            positions = torch.arange(T, device=ids.device)
        x = self.wte(ids) + self.wpe(positions)  # (B, T, C)
        mask = None if mask is None else mask[:, None]  # (B, 1, T, S)
        if mask is not None and x.device.type == "cpu" and not torch.is_autocast_enabled("cpu"):
            # attention wants numbers to add; made once here, not in every layer
            mask = torch.zeros(mask.shape, dtype=x.dtype).masked_fill_(~mask, float("-inf"))
        for layer, block in enumerate(self.h):
            # Of the last block nothing but keys and values is needed in the columns before
            x = block(x, mask, cache, layer, columns, start if block is self.h[-1] else 0)
        if cache is not None and columns is None:
            cache.seen += T
        return self.ln_f(x)

    def step(self, ids, positions, bias, cache):
        """One token more in every row, ids (B,) at positions (B,), to hidden states (B, C): what
        `forward` gives for ids[:, None], with less to do between the products, where a small model
        spends half of its time. bias (B, S): 0 where a row may look, else -inf."""
        (B,), C, nh, end = ids.shape, self.config.n_embd, self.config.n_head, cache.seen + 1
        bias = bias[:, None, None]  # (B, 1, 1, S)
        x = F.embedding(ids, self.wte.weight) + F.embedding(positions, self.wpe.weight)  # (B, C)
        for block, keys, values in zip(self.h, cache.k, cache.v):
            attn, mlp = block.attn, block.mlp
            qkv = attn.c_attn(block.ln_1(x)).view(B, 3, nh, 1, C // nh)
            q, k, v = qkv.unbind(1)  # (B, nh, 1, hs)
            keys.narrow(2, cache.seen, 1).copy_(k)
            values.narrow(2, cache.seen, 1).copy_(v)
            keys, values = keys.narrow(2, 0, end), values.narrow(2, 0, end)  # (B, nh, S, hs)
            y = F.scaled_dot_product_attention(q, keys, values, attn_mask=bias)
            x = x + attn.c_proj(y.view(B, C))
            x = x + mlp(block.ln_2(x))
        cache.seen = end
        return self.ln_f(x)

    def unembed(self, hidden):
        """Hidden states (..., C) to logits (..., tokens), by wte, or by an untied model's lm_head.

        In float32 whatever the trunk computes in: GPT-2's logits lie between -130 and -35, where
        neighbours in bfloat16 are a quarter to one apart, and a log-prob is a difference of them.
        """
        with torch.autocast(hidden.device.type, enabled=False):
            return hidden.float() @ (self.lm_head or self.wte).weight[: self.tokens].float().T


class ScalarModel(nn.Module):
    """A transformer with one number at every token: a linear read-out of its last hidden state
    there.

    The preference model is read at an answer's last token (Stiennon et al. 2020, arXiv 2009.01325,
    section 3.4), PPO's critic at every token, as what is expected before the next one is known
    (Ziegler et al. 2019, arXiv 1909.08593, section 2.1). A critic that starts as a copy of a
    preference model starts with its head as well.

    `gain` and `shift` are buffers, set once after training so that the scores of the SFT model's
    own answers have mean 0 and standard deviation 1, and then frozen (Ziegler et al. 2019, section
    2.1). A copy keeps them: the critic's values, too, are in deviations of that score.
    """

    def __init__(self, gpt: GPT):
        super().__init__()
        self.gpt = gpt
        if gpt.lm_head is not None:
            # Nothing reads it; several processes would wait for its gradient
            gpt.lm_head.requires_grad_(False)
        self.score = nn.Linear(gpt.config.n_embd, 1)
        # Stiennon et al. 2020, their code
        nn.init.normal_(self.score.weight, std=(gpt.config.n_embd + 1) ** -0.5)
        nn.init.zeros_(self.score.bias)
        self.register_buffer("gain", torch.ones(()))
        self.register_buffer("shift", torch.zeros(()))

    def forward(self, ids, positions=None, mask=None, start=0):
        """Token ids (B, T) to numbers (B, T - start), float32; the arguments are GPT.forward's."""
        hidden = self.gpt(ids, positions, mask, start=start)
        # Rewards and values are differences too
        with torch.autocast(hidden.device.type, enabled=False):
            values = self.score(hidden.to(self.score.weight.dtype)).squeeze(-1)
        return values * self.gain + self.shift


def freeze(gpt: GPT, blocks: int) -> None:
    """Let the lowest `blocks` blocks, and the embeddings with them, learn nothing more; 0 freezes
    nothing. UserError for a number of blocks that the model does not have."""
    if not 0 <= blocks <= len(gpt.h):
        raise UserError(
            f"--freeze {blocks}: the model has {len(gpt.h)} blocks; give 0 (none) to {len(gpt.h)} (all)"
        )
    for part in (gpt.wte, gpt.wpe, *gpt.h[:blocks]) if blocks else ():
        part.requires_grad_(False)


def attention_mask(valid):
    """(B, T) bool, True at real tokens, to (B, T, T): causal, blind to padding.

    A padded query sees itself, so that no row of the softmax is empty (it would be NaN).
    """
    T = valid.shape[1]
    causal = torch.ones(T, T, dtype=torch.bool, device=valid.device).tril()
    return causal & valid[:, None, :] | torch.eye(T, dtype=torch.bool, device=valid.device)


def positions_of(valid):
    """(B, T) bool to positions (B, T): the first real token of a row has position 0, wherever its
    padding ends."""
    return (valid.long().cumsum(1) - 1).clamp(min=0)
