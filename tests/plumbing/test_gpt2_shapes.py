"""Files of transformers' GPT-2, in every layout that is met in the wild, read by us: the logits
must be its own."""

import base64
import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.testing import assert_close

from mincai import UserError
from mincai.model import GPTConfig
from mincai.plumbing import checkpoint, memory, weights
from mincai.plumbing.tokenizer import load_tokenizer
from mincai.sample import generate

transformers = pytest.importorskip("transformers")
# vocabulary, positions, layers, heads, channels, LayerNorm epsilon; the last has the heads of
# gpt2-xl, 25 of 64
SHAPES = [
    (50, 16, 1, 1, 8, 1e-5),
    (97, 40, 3, 4, 24, 1e-3),
    (64, 32, 2, 8, 64, 1e-5),
    (40, 16, 1, 25, 1600, 1e-5),
]


def random_gpt2(shape, std, **changes):
    """A GPT2LMHeadModel with every bias and gain away from 0 and 1, so that none can be
    mistaken."""
    vocab, positions, layers, heads, channels, epsilon = shape
    torch.manual_seed(sum(shape[:5]))
    model = transformers.GPT2LMHeadModel(
        transformers.GPT2Config(
            vocab_size=vocab,
            n_positions=positions,
            n_embd=channels,
            n_layer=layers,
            n_head=heads,
            layer_norm_epsilon=epsilon,
            initializer_range=std,
            bos_token_id=0,
            eos_token_id=0,
            **changes,
        )
    ).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def ids_for(model):
    """Two rows as long as the model reads."""
    return torch.randint(model.config.vocab_size, (2, model.config.n_positions))


@torch.no_grad()
def same_logits(folder, theirs):
    """Our reading of the folder against the model that it came from -> our model."""
    ours, ids = checkpoint.load(folder), ids_for(theirs)
    expected = theirs(ids).logits
    assert expected.std() > 0.5  # else agreement would mean little
    assert_close(ours.unembed(ours(ids)), expected, atol=1e-4, rtol=0)
    return ours


@pytest.fixture
def theirs():
    return random_gpt2((97, 40, 3, 4, 24, 1e-5), 0.3)


def rewrite(folder, change):
    """model.safetensors after change(tensors) -> tensors."""
    tensors = change(load_file(folder / "model.safetensors"))
    save_file({k: v.contiguous() for k, v in tensors.items()}, folder / "model.safetensors")


# --- shapes -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", SHAPES)
def test_float32_logits(tmp_path, shape):
    theirs = random_gpt2(shape, 0.3 if shape[4] < 1000 else 0.05)
    theirs.save_pretrained(tmp_path, safe_serialization=True)
    vocab, positions, layers, heads, channels, epsilon = shape
    assert same_logits(tmp_path, theirs).config == GPTConfig(
        vocab, positions, layers, heads, channels, epsilon
    )


@torch.no_grad()
@pytest.mark.parametrize("shape", SHAPES)
def test_bfloat16_logits(tmp_path, shape):
    """Both sides round each step to 8 bits, each in its own order of summing. Logits below 2 have
    steps of at most 1/128, so 0.02 allows two of them; the weights are drawn small enough for
    that."""
    theirs = random_gpt2(shape, 0.4 / shape[4] ** 0.5).bfloat16()
    theirs.save_pretrained(tmp_path, safe_serialization=True)
    assert (
        load_file(tmp_path / "model.safetensors")["transformer.wte.weight"].dtype == torch.bfloat16
    )
    ours, ids = checkpoint.load(tmp_path).bfloat16(), ids_for(theirs)
    assert ours.wte.weight.equal(theirs.transformer.wte.weight)
    logp, expected = (
        torch.log_softmax(logits.float(), dim=-1)
        for logits in (ours.unembed(ours(ids)), theirs(ids).logits)
    )
    assert expected.std() > 0.3 and theirs(ids).logits.abs().max() < 2
    assert_close(logp, expected, atol=2e-2, rtol=0)


# --- layouts ------------------------------------------------------------------------------------------------


def test_sharded(tmp_path, theirs):
    theirs.save_pretrained(tmp_path, safe_serialization=True, max_shard_size="40KB")
    assert (tmp_path / "model.safetensors.index.json").exists() and len(
        list(tmp_path.glob("*.safetensors"))
    ) > 2
    same_logits(tmp_path, theirs)


def test_names_without_prefix(tmp_path, theirs):
    """As in the files that are published for GPT-2, which were saved from the model without its
    head."""
    theirs.save_pretrained(tmp_path)
    rewrite(
        tmp_path, lambda tensors: {k.removeprefix("transformer."): v for k, v in tensors.items()}
    )
    assert "h.0.attn.c_attn.weight" in load_file(tmp_path / "model.safetensors")
    same_logits(tmp_path, theirs)
    bare = tmp_path / "bare"
    theirs.transformer.save_pretrained(bare)
    same_logits(bare, theirs)


def test_stored_masks_and_tied_head(tmp_path, theirs):
    theirs.save_pretrained(tmp_path)

    def change(tensors):
        for layer in range(3):
            tensors[f"transformer.h.{layer}.attn.bias"] = torch.ones(1, 1, 40, 40).tril().byte()
            tensors[f"transformer.h.{layer}.attn.masked_bias"] = torch.tensor(-1e4)
        return tensors | {"lm_head.weight": tensors["transformer.wte.weight"].clone()}

    rewrite(tmp_path, change)
    same_logits(tmp_path, theirs)


# --- what is refused ----------------------------------------------------------------------------------------


def refuse(folder, *words):
    with pytest.raises(UserError) as caught:
        checkpoint.load(folder)
    text = str(caught.value)
    assert "\n" not in text
    for word in (str(folder), *words):
        assert word in text, text


def test_untied_head(tmp_path, theirs):
    """A head of its own is read, counted, written again and opened by the other side."""
    untied = random_gpt2((97, 40, 3, 4, 24, 1e-5), 0.3, tie_word_embeddings=False).eval()
    untied.save_pretrained(tmp_path / "untied")
    ours, ids = checkpoint.load(tmp_path / "untied"), torch.randint(97, (2, 17))
    assert memory.parameters(ours.config) == sum(p.numel() for p in ours.parameters())
    with torch.no_grad():
        logits = untied(ids).logits
        assert_close(ours.unembed(ours(ids)), logits, atol=1e-4, rtol=1e-4)
        assert (ours(ids) @ ours.wte.weight.T - logits).abs().max() > 0.1
        checkpoint.save(ours, tmp_path / "back")
        again = transformers.GPT2LMHeadModel.from_pretrained(tmp_path / "back").eval()
        assert torch.equal(again(ids).logits, logits)
    scalar = checkpoint.load(tmp_path / "untied", scalar=True, new_head=True)
    checkpoint.save(scalar, tmp_path / "pm")
    with torch.no_grad():
        assert_close(checkpoint.load(tmp_path / "pm", scalar=True)(ids), scalar(ids))
    scalar(
        ids
    ).sum().backward()  # whatever learns has a gradient, or distributed training would stop
    assert all((p.grad is not None) == p.requires_grad for p in scalar.parameters())
    assert not scalar.gpt.lm_head.weight.requires_grad
    theirs.save_pretrained(tmp_path)
    rewrite(
        tmp_path,
        lambda tensors: tensors | {"lm_head.weight": untied.lm_head.weight.detach().clone()},
    )
    refuse(tmp_path, "lm_head.weight differs from wte.weight", "tie_word_embeddings")
    rewrite(
        tmp_path / "untied",
        lambda tensors: {k: v for k, v in tensors.items() if k != "lm_head.weight"},
    )
    refuse(tmp_path / "untied", "lm_head.weight is missing")


def test_weights_of_another_architecture(tmp_path, theirs):
    """A folder put together wrongly: GPT-2's config.json beside BERT's weights."""
    theirs.save_pretrained(tmp_path)
    key = "bert.encoder.layer.0.attention.self.query.weight"
    rewrite(tmp_path, lambda tensors: tensors | {key: torch.zeros(24, 24)})
    refuse(tmp_path, f"weight {key} does not belong to a GPT-2")
    rewrite(tmp_path, lambda tensors: {key: tensors[key]})
    refuse(tmp_path, f"weight {key} does not belong to a GPT-2 (41 differ)")


def test_embedding_smaller_than_the_vocabulary(tmp_path, theirs):
    """The folder loads; a token beyond its rows would fail deep inside, and on a GPU without a
    word."""
    theirs.save_pretrained(tmp_path)
    lines = (base64.b64encode(bytes([rank])) + b" %d\n" % rank for rank in range(256))
    (tmp_path / "tokenizer.tiktoken").write_bytes(b"".join(lines))
    ours, tokenizer = checkpoint.load(tmp_path), load_tokenizer(tmp_path)
    with pytest.raises(
        UserError, match="the vocabulary has 257 tokens, the embedding only 97 rows"
    ):
        weights.check_vocabulary(ours.config, tokenizer, tmp_path)


# --- and back -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prompt", [[3], [5, 9, 2, 6, 5, 35], list(range(1, 24))])
def test_greedy_text_of_a_folder_that_we_wrote(tmp_path, tiny_gpt, prompt):
    """Up to the same length, and with the same stop token in the middle."""
    answer = generate(tiny_gpt, [prompt], 40, stop=(), temperature=0.0).lists()[0]
    assert len(answer) == 40 and len(set(answer)) > 3  # more than one token said over and over
    stop = answer[-1]
    until = answer[: answer.index(stop) + 1]
    checkpoint.save(tiny_gpt, tmp_path / "ours", {"eos_token_id": stop, "bos_token_id": stop})
    assert json.loads((tmp_path / "ours" / "config.json").read_text())["eos_token_id"] == stop
    theirs = transformers.GPT2LMHeadModel.from_pretrained(tmp_path / "ours").eval()
    ids = torch.tensor([prompt])
    common = dict(
        attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=40, pad_token_id=stop
    )
    assert theirs.generate(ids, eos_token_id=None, **common)[0, len(prompt) :].tolist() == answer
    assert theirs.generate(ids, **common)[0, len(prompt) :].tolist() == until
    ours = generate(checkpoint.load(tmp_path / "ours"), [prompt], 40, stop={stop}, temperature=0.0)
    assert ours.lists()[0] == until
