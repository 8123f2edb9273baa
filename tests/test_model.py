"""The transformer against transformers' GPT-2, and against itself: cache, padding, causality."""

import pytest
import torch
from torch.testing import assert_close

from mincai import UserError, checkpoint, losses
from mincai.model import GPT, GPTConfig, KVCache, ScalarModel, attention_mask, freeze, positions_of
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
    theirs = hf_gpt.generate(IDS[:1], attention_mask=torch.ones_like(IDS[:1]), do_sample=False,
                             max_new_tokens=40, eos_token_id=None, pad_token_id=63)
    assert ours == theirs[0, IDS.shape[1]:].tolist()


@torch.no_grad()
def test_model_of_transformers_can_be_loaded(tmp_path):
    """The other direction: a folder that transformers wrote, with its own weights and another shape."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    theirs = transformers.GPT2LMHeadModel(transformers.GPT2Config(
        vocab_size=50, n_positions=16, n_embd=24, n_layer=3, n_head=4, layer_norm_epsilon=1e-3)).eval()
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
        steps.append(tiny_gpt(new[:, t:t + 1], positions, valid[:, None], cache)[:, 0])
    steps = torch.stack(steps, dim=1)  # (2, 5, C)
    for row, prompt in enumerate(rows):
        full = tiny_gpt(torch.tensor([prompt + new[row].tolist()]))[0]
        assert_close(steps[row], full[len(prompt) - 1:], atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_cache_written_by_column_equals_the_growing_one(tiny_gpt):
    """The way of CUDA graphs: keys go to a column given as a tensor, attention sees the whole cache."""
    full = tiny_gpt(IDS)
    cache = KVCache(tiny_gpt.config, 2, 16)
    tiny_gpt(IDS[:, :4], cache=cache)
    for t in range(4, IDS.shape[1]):
        visible = (torch.arange(16) <= t).expand(2, 1, 16)
        step = tiny_gpt(IDS[:, t:t + 1], torch.full((2, 1), t), visible, cache, torch.tensor([t]))
        assert_close(step[:, 0], full[:, t], atol=1e-4, rtol=1e-4)


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
def test_a_score_is_the_mean_of_the_values_in_sight(tiny_gpt):
    model = ScalarModel(tiny_gpt)
    values = model.score(tiny_gpt(IDS)).squeeze(-1)
    found = model(IDS)
    for t in range(IDS.shape[1]):
        assert_close(found[:, t], values[:, :t + 1].mean(1), atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_likelihood_is_added_from_the_answers_first_token_on(tiny_gpt):
    """Against a sum by hand; an int or a start of its own for each row; padding on either side changes nothing."""
    torch.manual_seed(0)
    plain, model = ScalarModel(tiny_gpt), ScalarModel(tiny_gpt, likelihood=0.25)
    model.score = plain.score
    logp = torch.log_softmax(tiny_gpt.unembed(tiny_gpt(IDS)), -1)  # (2, T, V)
    starts, T = (2, 5), IDS.shape[1]
    found = model(IDS, start=torch.tensor(starts))
    for row, start in enumerate(starts):
        said = [float(logp[row, t - 1, IDS[row, t]]) if t >= start else 0.0 for t in range(T)]
        for t in range(T):
            assert float(found[row, t] - plain(IDS)[row, t]) == pytest.approx(0.25 * sum(said[:t + 1]), abs=1e-4)
        assert_close(model(IDS[row:row + 1], start=start)[0], found[row], atol=1e-5, rtol=1e-5)
    ids, valid = left_pad([IDS[0].tolist(), [1] * (T + 3)])
    padded = model(ids, positions_of(valid), attention_mask(valid), start=starts[0] + 3)
    assert_close(padded[0, 3:], found[0], atol=1e-4, rtol=1e-4)
    ids = torch.cat([IDS, torch.zeros(2, 3, dtype=torch.long)], 1)
    assert_close(model(ids, start=torch.tensor(starts))[:, :T], found, atol=1e-5, rtol=1e-5)
    assert_close(plain(IDS, start=3), plain(IDS), atol=0, rtol=0)  # without the weight nobody looks at it
    with pytest.raises(AssertionError, match="where the answer starts"):
        model(IDS)


def test_the_loss_of_pairs_reaches_the_logits(tiny_gpt):
    """With no value at all, raising one answer over another raises its likelihood."""
    model = ScalarModel(tiny_gpt, likelihood=1.0)
    model.score.weight.data.zero_()
    before = model(IDS, start=4)[:, -1].detach()
    losses.preference_loss(*model(IDS, start=4)[:, -1:], torch.ones(1))[0].backward()
    with torch.no_grad():
        for p in tiny_gpt.parameters():
            p -= 0.01 * p.grad
    after = model(IDS, start=4)[:, -1].detach()
    assert after[0] - after[1] > before[0] - before[1] and model.likelihood.grad is not None


def test_freeze_keeps_blocks_and_embeddings(tiny_gpt):
    freeze(tiny_gpt, 0)
    assert all(p.requires_grad for p in tiny_gpt.parameters())
    freeze(tiny_gpt, 1)
    still = {name for name, p in tiny_gpt.named_parameters() if not p.requires_grad}
    assert {"wte.weight", "wpe.weight", "h.0.attn.c_attn.weight"} <= still
    assert not any(name.startswith(("h.1", "ln_f")) for name in still)
    for blocks in (-1, len(tiny_gpt.h) + 1):
        with pytest.raises(UserError, match=f"--freeze {blocks}: the model has {len(tiny_gpt.h)} blocks"):
            freeze(tiny_gpt, blocks)


@torch.no_grad()
def test_the_mean_is_not_rounded_to_16_bits(tiny_gpt):
    model = ScalarModel(tiny_gpt)
    model.score.weight.zero_()
    model.score.bias.fill_(1 + 2 ** -7)  # bfloat16 holds it, but not three times it
    valid = torch.ones_like(IDS, dtype=torch.bool)
    with torch.autocast("cpu", torch.bfloat16):
        found = model(IDS, positions_of(valid), attention_mask(valid))
    assert_close(found, torch.full_like(found, 1 + 2 ** -7), atol=1e-6, rtol=0)


def test_fresh_residual_layers_start_smaller(tiny_config):
    """By 1 / sqrt(number of residual layers), 1/2 for two blocks: depth must not raise the variance."""
    torch.manual_seed(0)
    for block in GPT(tiny_config).h:
        for small, usual in ((block.attn.c_proj, block.attn.c_attn), (block.mlp.c_proj, block.mlp.c_fc)):
            assert_close(small.weight.std() / usual.weight.std(), torch.tensor(0.5), atol=0, rtol=0.1)
