"""The transformer against transformers' GPT-2, and against itself: cache, padding, causality."""

import pytest
import torch
from torch.testing import assert_close

from mincai import UserError
from mincai.model import GPT, GPTConfig, KVCache, ScalarModel, attention_mask, freeze, positions_of
from mincai.plumbing import checkpoint
from mincai.sample import generate, left_pad

IDS = torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6, 5, 35], [2, 7, 1, 8, 2, 8, 1, 8, 28, 45]])


@pytest.fixture
def hf_gpt(tiny_gpt, tmp_path):
    """The tiny model saved by us and opened by transformers."""
    transformers = pytest.importorskip("transformers")
    checkpoint.save(tiny_gpt, tmp_path / "tiny", {"eos_token_id": 63, "bos_token_id": 63})
    return transformers.GPT2LMHeadModel.from_pretrained(tmp_path / "tiny").eval()


@torch.no_grad()
def test_logits_equal_those_of_transformers(tiny_gpt, hf_gpt):
    """Guards the tanh GELU, the Conv1D transposes, the LayerNorm epsilon and the tied embedding."""
    ours = tiny_gpt.unembed(tiny_gpt(IDS))
    assert ours.std() > 1  # else agreement would mean little
    assert_close(ours, hf_gpt(IDS).logits, atol=1e-4, rtol=0)


def test_greedy_answer_equals_that_of_transformers(tiny_gpt, hf_gpt):
    ours = generate(tiny_gpt, [IDS[0].tolist()], 40, stop=(), temperature=0.0).lists()[0]
    theirs = hf_gpt.generate(
        IDS[:1],
        attention_mask=torch.ones_like(IDS[:1]),
        do_sample=False,
        max_new_tokens=40,
        eos_token_id=None,
        pad_token_id=63,
    )
    assert ours == theirs[0, IDS.shape[1] :].tolist()


@pytest.mark.parametrize("padded", [False, True])
def test_columns_from_start_on_are_those_of_the_whole(tiny_gpt, padded):
    """Hidden states and gradients: what the columns before say is still read, and learnt from."""
    valid = torch.tensor([[True] * 10, [not padded] * 4 + [True] * 6])
    how = dict(positions=positions_of(valid), mask=attention_mask(valid)) if padded else {}
    weights = torch.randn(2, 4, tiny_gpt.config.n_embd, generator=torch.Generator().manual_seed(0))
    found = []
    for start in (0, 6):
        hidden = tiny_gpt(IDS, **how, start=start)[:, 6 - start :]  # (2, 4, C)
        (hidden * weights).sum().backward()
        found.append([hidden.detach(), *(p.grad.clone() for p in tiny_gpt.parameters())])
        tiny_gpt.zero_grad()
    assert found[1][0].shape == weights.shape and found[1][1][IDS[0, 0]].abs().max() > 0
    assert_close(found[1], found[0], atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_model_of_transformers_can_be_loaded(tmp_path):
    """The other direction: a folder that transformers wrote, with its own weights and another
    shape."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    theirs = transformers.GPT2LMHeadModel(
        transformers.GPT2Config(
            vocab_size=50, n_positions=16, n_embd=24, n_layer=3, n_head=4, layer_norm_epsilon=1e-3
        )
    ).eval()
    theirs.save_pretrained(tmp_path)
    ours = checkpoint.load(tmp_path)
    assert ours.config == GPTConfig(50, 16, 3, 4, 24, 1e-3)
    assert_close(ours.unembed(ours(IDS)), theirs(IDS).logits, atol=1e-4, rtol=0)


@torch.no_grad()
def test_cached_steps_equal_the_full_forward(tiny_gpt):
    """Two rows of different length, left-padded, token by token through the cache."""
    rows = [IDS[0, :6].tolist(), IDS[1, :3].tolist()]
    new = torch.tensor([[10, 20, 30, 40], [11, 21, 31, 41]])
    ids, valid = left_pad(rows)
    cache = KVCache(tiny_gpt.config, 2, 10)
    hidden = tiny_gpt(ids, positions_of(valid), attention_mask(valid), cache)
    steps = [hidden[:, -1]]
    for t in range(4):
        valid = torch.cat([valid, torch.ones(2, 1, dtype=torch.bool)], dim=1)
        positions = valid.sum(1, keepdim=True) - 1
        steps.append(tiny_gpt(new[:, t : t + 1], positions, valid[:, None], cache)[:, 0])
    steps = torch.stack(steps, dim=1)  # (2, 5, C)
    for row, prompt in enumerate(rows):
        full = tiny_gpt(torch.tensor([prompt + new[row].tolist()]))[0]
        assert_close(steps[row], full[len(prompt) - 1 :], atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_cache_written_by_column_equals_the_growing_one(tiny_gpt):
    """The way of CUDA graphs: keys go to a column given as a tensor, attention sees the whole
    cache."""
    full = tiny_gpt(IDS)
    cache = KVCache(tiny_gpt.config, 2, 16)
    tiny_gpt(IDS[:, :4], cache=cache)
    for t in range(4, IDS.shape[1]):
        visible = (torch.arange(16) <= t).expand(2, 1, 16)
        step = tiny_gpt(IDS[:, t : t + 1], torch.full((2, 1), t), visible, cache, torch.tensor([t]))
        assert_close(step[:, 0], full[:, t], atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_a_step_equals_the_forward_of_one_token(tiny_gpt):
    """To the bit: rows of uneven length, one of which sees no column after its first new one."""
    prompts = [IDS[0, :6].tolist(), IDS[1, :3].tolist(), [9]]
    ids, valid = left_pad(prompts)
    plain, fast = (KVCache(tiny_gpt.config, 3, 10) for _ in range(2))
    for cache in (plain, fast):
        tiny_gpt(ids, positions_of(valid), attention_mask(valid), cache)
    for t, new in enumerate(([10, 20, 30], [40, 11, 21], [31, 41, 5])):
        alive = torch.tensor([True, True, t == 0])
        valid, new = torch.cat([valid, alive[:, None]], dim=1), torch.tensor(new)
        positions = valid.sum(1, keepdim=True) - 1
        expected = tiny_gpt(new[:, None], positions, valid[:, None], plain)[:, 0]
        bias = torch.zeros(valid.shape).masked_fill(~valid, float("-inf"))
        assert torch.equal(tiny_gpt.step(new, positions[:, 0], bias, fast), expected)
    assert torch.equal(fast.k, plain.k) and torch.equal(fast.v, plain.v) and fast.seen == plain.seen


def test_filled_cache_without_a_mask_is_refused(tiny_gpt):
    """Causal by default would then mean: one query, which sees only the first key."""
    cache = KVCache(tiny_gpt.config, 2, 16)
    tiny_gpt(IDS[:, :4], cache=cache)
    with pytest.raises(AssertionError):
        tiny_gpt(IDS[:, 4:5], torch.full((2, 1), 4), cache=cache)


@torch.no_grad()
@pytest.mark.parametrize("width", [1, 5, 20])
def test_left_padding_changes_nothing(tiny_gpt, width):
    full = tiny_gpt(IDS)
    ids = torch.cat([torch.full((2, width), 17), IDS], dim=1)  # padded with a real token's id
    valid = torch.arange(ids.shape[1]).expand(2, -1) >= width
    padded = tiny_gpt(ids, positions_of(valid), attention_mask(valid))
    assert_close(padded[:, width:], full, atol=1e-4, rtol=1e-4)
    assert padded.isfinite().all()  # padded queries too: NaN would spread through a loss


@torch.no_grad()
def test_later_tokens_do_not_change_earlier_outputs(tiny_gpt):
    edited = IDS.clone()
    edited[:, 6:] = 50
    before, after = tiny_gpt(IDS), tiny_gpt(edited)
    assert_close(after[:, :6], before[:, :6], atol=1e-5, rtol=1e-5)
    assert (after[:, 6:] - before[:, 6:]).abs().amax(-1).min() > 1e-2
    mask = attention_mask(torch.ones(2, IDS.shape[1], dtype=torch.bool))
    assert_close(tiny_gpt(edited, mask=mask)[:, :6], before[:, :6], atol=1e-4, rtol=1e-4)


def test_positions_start_at_the_first_real_token():
    valid = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1], [1, 1, 0, 0]]).bool()
    assert positions_of(valid).tolist() == [[0, 0, 0, 1], [0, 1, 2, 3], [0, 1, 1, 1]]


def test_attention_mask_by_hand():
    valid = torch.tensor([[0, 1, 1]]).bool()
    assert attention_mask(valid).long().tolist() == [[[1, 0, 0], [0, 1, 0], [0, 1, 1]]]


@torch.no_grad()
def test_score_does_not_depend_on_padding_and_is_scaled_last(tiny_gpt):
    model = ScalarModel(tiny_gpt)
    plain = model(IDS)  # (2, T)
    ids, valid = left_pad([IDS[0].tolist(), IDS[1].tolist(), [1] * 14])
    padded = model(ids, positions_of(valid), attention_mask(valid))
    assert_close(padded[:2, -1], plain[:, -1], atol=1e-4, rtol=1e-4)
    model.gain.fill_(2.0)
    model.shift.fill_(-1.0)
    assert_close(model(IDS), 2 * plain - 1)
    assert "gain" not in dict(model.named_parameters())  # set once, never trained


@torch.no_grad()
def test_a_score_is_read_out_of_its_tokens_hidden_state(tiny_gpt):
    model = ScalarModel(tiny_gpt)
    model.gain.fill_(2.0)
    model.shift.fill_(-1.0)
    hidden = tiny_gpt(IDS)
    for t in range(IDS.shape[1]):
        read = hidden[:, t] @ model.score.weight[0] + model.score.bias
        assert_close(model(IDS)[:, t], 2 * read - 1, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("prompt", [8, 64, 256])
def test_a_critic_holds_a_planted_value_function_however_long_the_prompt(prompt):
    """The value at each of 8 answer tokens is that token's own number: a mean over prompt and
    answer cannot follow it once the prompt is long."""
    torch.manual_seed(0)
    T, V = prompt + 8, 12
    critic = ScalarModel(GPT(GPTConfig(vocab_size=V, block_size=T, n_layer=1, n_head=2, n_embd=32)))
    planted = torch.randn(V)
    optimizer = torch.optim.Adam(critic.parameters(), lr=0.01)

    def missed():
        """(squared error, what it is of, both a token) on new rows."""
        ids = torch.randint(V, (16, T))
        target = planted[ids[:, prompt:]]
        return (critic(ids)[:, prompt:] - target).square().mean(), target.var(unbiased=False)

    for _ in range(100):
        optimizer.zero_grad()
        missed()[0].backward()
        optimizer.step()
    with torch.no_grad():
        error, variance = missed()
    assert 1 - error / variance > 0.99


def test_freeze_keeps_blocks_and_embeddings(tiny_gpt):
    freeze(tiny_gpt, 0)
    assert all(p.requires_grad for p in tiny_gpt.parameters())
    freeze(tiny_gpt, 1)
    still = {name for name, p in tiny_gpt.named_parameters() if not p.requires_grad}
    assert {"wte.weight", "wpe.weight", "h.0.attn.c_attn.weight"} <= still
    assert not any(name.startswith(("h.1", "ln_f")) for name in still)
    seen = []  # what the frozen part hands on has no graph, so nothing goes back into it
    for block in tiny_gpt.h:
        block.register_forward_hook(lambda block, args, x: seen.append((args[0], x)))
    tiny_gpt(IDS).sum().backward()
    assert [x.requires_grad for x, _ in seen] == [False] * 2 + [True] * (len(seen) - 2)
    assert seen[0][1].grad_fn is None and seen[1][1].grad_fn is not None
    for blocks in (-1, len(tiny_gpt.h) + 1):
        with pytest.raises(
            UserError, match=f"--freeze {blocks}: the model has {len(tiny_gpt.h)} blocks"
        ):
            freeze(tiny_gpt, blocks)


@torch.no_grad()
def test_scores_are_not_rounded_to_16_bits(tiny_gpt):
    model = ScalarModel(tiny_gpt)
    model.score.weight.zero_()
    model.score.bias.fill_(1 + 2**-12)  # which bfloat16 does not hold
    with torch.autocast("cpu", torch.bfloat16):
        found = model(IDS)
    assert_close(found, torch.full(IDS.shape, 1 + 2**-12), atol=1e-6, rtol=0)


@torch.no_grad()
def test_logits_far_from_zero_keep_their_log_probs_in_bfloat16(tiny_gpt):
    """All logits of a token moved by one number, to where GPT-2's lie: no log-prob changes, but
    16-bit logits would be half a unit apart there."""
    tiny_gpt.ln_f.weight[0], tiny_gpt.ln_f.bias[0] = (
        0.0,
        -11.0,
    )  # the hidden states' first number is -11
    tiny_gpt.wte.weight[:, 0] = 10.0
    ids = torch.randint(64, (8, 40), generator=torch.Generator().manual_seed(0))
    exact = tiny_gpt.unembed(tiny_gpt(ids))
    with torch.autocast("cpu", torch.bfloat16):
        hidden = tiny_gpt(ids)
        logits = tiny_gpt.unembed(hidden)
        low = hidden @ tiny_gpt.wte.weight.T
    assert (
        -112 < exact.mean() < -108 and logits.dtype == torch.float32 and low.dtype == torch.bfloat16
    )

    def error(found):
        return float((found.float().log_softmax(-1) - exact.log_softmax(-1)).abs().mean())

    assert error(logits) < 0.02 < 0.1 < error(low)


def test_fresh_residual_layers_start_smaller(tiny_config):
    """By 1 / sqrt(number of residual layers), 1/2 for two blocks: depth must not raise the
    variance."""
    torch.manual_seed(0)
    for block in GPT(tiny_config).h:
        for small, usual in (
            (block.attn.c_proj, block.attn.c_attn),
            (block.mlp.c_proj, block.mlp.c_fc),
        ):
            assert_close(
                small.weight.std() / usual.weight.std(), torch.tensor(0.5), atol=0, rtol=0.1
            )
