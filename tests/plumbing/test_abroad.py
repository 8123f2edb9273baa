"""What we save, opened by transformers: its ids, logits, texts and scores are ours. Runs with
version 4 and version 5."""

import json
import random

import pytest
import torch
from test_tokenizer import gpt2, tokenizer  # noqa: F401, fixtures

from mincai.model import GPT, GPTConfig, ScalarModel
from mincai.plumbing import checkpoint
from mincai.sample import generate

transformers = pytest.importorskip("transformers")
PROMPT = "how do i burn a lamp ?"


def some_texts(tiny_base):
    """The tiny world's prompts, and as many texts of characters drawn from many scripts."""
    lines = (tiny_base / "prompts.jsonl").read_text(encoding="utf-8").splitlines()
    texts, rng = [json.loads(line)["prompt"] for line in lines[:600]], random.Random(0)
    ranges = [(32, 127), (160, 800), (0x3000, 0x9FFF), (0x1F300, 0x1F6FF), (9, 11), (32, 33)]
    for _ in range(600):
        drawn = [chr(rng.randrange(*rng.choice(ranges))) for _ in range(rng.randrange(40))]
        texts.append("".join(drawn))
    return [*texts, "<|endoftext|> a", "ÿ ÿÿ", "don't  we've\n\n 12"]


@pytest.fixture(params=["tokenizer", "gpt2"])
def saved(request, tmp_path):
    """(vocabulary, model, folder, preference model, its folder), the weights random."""
    ours = request.getfixturevalue(request.param)
    torch.manual_seed(0)
    shape = GPTConfig(vocab_size=ours.n_vocab, block_size=64, n_layer=2, n_head=2, n_embd=16)
    model, pm = GPT(shape), ScalarModel(GPT(shape))
    pm.gain.fill_(2.5), pm.shift.fill_(-1.75), pm.score.bias.data.fill_(0.5)
    extra = ours.files() | ours.special()
    checkpoint.save(model, tmp_path / "sft", extra)
    checkpoint.save(pm, tmp_path / "pm", extra)
    return ours, model, str(tmp_path / "sft"), pm, str(tmp_path / "pm")


def test_a_language_model_gives_our_ids_logits_and_texts(saved, tiny_base):
    ours, model, folder, _, _ = saved
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    texts = some_texts(tiny_base)
    assert len(set(texts)) > 1000
    for text in texts:
        ids = ours.encode(text)
        assert theirs(text)["input_ids"] == ids
        assert theirs.decode([*ids, ours.eot], skip_special_tokens=True) == text
    ids = torch.tensor([ours.encode(PROMPT)])
    with torch.no_grad():
        found = transformers.AutoModelForCausalLM.from_pretrained(folder)(ids).logits
        torch.testing.assert_close(found, model.unembed(model(ids)), atol=1e-5, rtol=1e-5)
    write_on = transformers.pipeline("text-generation", model=folder, device="cpu")
    text = write_on(PROMPT, max_new_tokens=8, do_sample=False)[0]["generated_text"]
    [answer] = generate(model, ids.tolist(), 8, {ours.eot}, temperature=0.0).lists()
    assert text == PROMPT + ours.decode(answer)


def test_its_settings_draw_as_our_stages_do(saved):
    """From all tokens at temperature 1, where version 4 and 5 would take the 50 likeliest; to the
    end of text. Padding is another token than the end: a trainer leaves padding out of its loss."""
    ours, _, folder, _, _ = saved
    settings = transformers.AutoModelForCausalLM.from_pretrained(folder).generation_config
    assert (settings.do_sample, settings.temperature, settings.top_k) == (True, 1.0, 0)
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    for found in (settings, theirs):
        assert found.bos_token_id == found.eos_token_id == ours.eot
        assert found.pad_token_id == ours.ranks[b"\xff"] != ours.eot


def test_a_preference_model_gives_our_score(saved):
    """Also in a batch, where the end of text that it is read at must not be taken for padding."""
    ours, _, _, pm, folder = saved
    judge = transformers.AutoModelForSequenceClassification.from_pretrained(folder).eval()
    assert type(judge) is transformers.GPT2ForSequenceClassification and judge.num_labels == 1
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    answers = [f"Human: {PROMPT}\nAssistant:{text}" for text in (" no .", " sure , take it .", "")]
    rows = [[*ours.encode(text), ours.eot] for text in answers]
    with torch.no_grad():
        wanted = [pm(torch.tensor([row]))[0, -1].item() for row in rows]
        batch = theirs.pad({"input_ids": rows}, return_tensors="pt")
        found = judge(**batch).logits[:, 0].tolist()
    assert found == pytest.approx(wanted, abs=1e-4) and max(wanted) - min(wanted) > 0.1
