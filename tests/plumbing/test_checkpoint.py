"""Checkpoints: every bit comes back, others' layouts are read, and a broken folder says what is
wrong."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from mincai import UserError
from mincai.model import GPT, GPTConfig, ScalarModel
from mincai.plumbing import checkpoint, output
from mincai.plumbing.tokenizer import from_ranks

IDS = torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6]])


@pytest.fixture
def folder(tiny_gpt, tmp_path):
    checkpoint.save(tiny_gpt, tmp_path / "model")
    return tmp_path / "model"


def edit_weights(folder, change):
    """Rewrite model.safetensors after change(dict of tensors)."""
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file({k: v.contiguous() for k, v in tensors.items()}, folder / "model.safetensors")


def edit_config(folder, **changes):
    config = json.loads((folder / "config.json").read_text())
    for key, value in changes.items():
        if value is None:
            del config[key]
        else:
            config[key] = value
    (folder / "config.json").write_text(json.dumps(config))


def same_bits(a, b):
    a, b = a.state_dict(), b.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


# --- round trips --------------------------------------------------------------------------------------------


def test_round_trip_is_exact(tiny_gpt, folder):
    loaded = checkpoint.load(folder)
    assert loaded.config == tiny_gpt.config and same_bits(loaded, tiny_gpt)
    assert torch.equal(loaded(IDS), tiny_gpt(IDS))
    assert all(p.requires_grad and p.dtype == torch.float32 for p in loaded.parameters())


def test_file_has_the_names_and_layout_of_gpt2(folder):
    tensors = load_file(folder / "model.safetensors")
    assert tensors["transformer.h.0.attn.c_attn.weight"].shape == (32, 96)  # [in, out]
    assert tensors["transformer.h.1.mlp.c_proj.weight"].shape == (128, 32)
    assert tensors["transformer.wte.weight"].shape == (64, 32)
    config = json.loads((folder / "config.json").read_text())
    assert config["architectures"] == ["GPT2LMHeadModel"] and config["torch_dtype"] == "float32"


def test_scalar_round_trip_is_exact(tiny_gpt, tmp_path):
    model = ScalarModel(tiny_gpt)
    model.gain.fill_(2.5)
    model.shift.fill_(-0.75)
    checkpoint.save(model, tmp_path / "pm")
    loaded = checkpoint.load(tmp_path / "pm", scalar=True)
    assert same_bits(loaded, model)
    torch.testing.assert_close(loaded(IDS), model(IDS))
    with pytest.raises(UserError, match="preference model"):
        checkpoint.load(tmp_path / "pm")


def test_a_score_for_other_libraries_stands_beside_our_own(tiny_gpt, tmp_path):
    """What they read is one matrix and no bias: w.(last hidden state) is our score, gain and shift
    in it. An untied trunk, and a head that nothing can be folded into, come back as well."""
    model = ScalarModel(tiny_gpt)
    model.gain.fill_(2.5), model.shift.fill_(-1.75), model.score.bias.data.fill_(0.5)
    checkpoint.save(model, tmp_path / "pm")
    tensors = load_file(tmp_path / "pm" / "model.safetensors")
    with torch.no_grad():
        ours = model(IDS)
        model.gpt.ln_f.bias.copy_(tensors["transformer.ln_f.bias"])
        theirs = model.gpt(IDS) @ tensors["score.weight"][0]
    torch.testing.assert_close(theirs, ours, atol=1e-5, rtol=0)
    again = checkpoint.load(tmp_path / "pm", scalar=True)
    assert torch.equal(again(IDS), ours)
    config = json.loads((tmp_path / "pm" / "config.json").read_text())
    assert config["architectures"] == ["GPT2ForSequenceClassification"]
    assert config["id2label"] == {"0": "score"}
    again.score.weight.data.zero_()
    checkpoint.save(again, tmp_path / "zero")
    assert same_bits(checkpoint.load(tmp_path / "zero", scalar=True), again)


def test_scalar_from_a_language_model_has_its_trunk_and_a_fresh_head(tiny_gpt, folder):
    torch.manual_seed(0)
    first = checkpoint.load(folder, scalar=True, new_head=True)
    torch.manual_seed(0)
    again = checkpoint.load(folder, scalar=True, new_head=True)
    assert same_bits(first.gpt, tiny_gpt) and same_bits(first, again)
    assert first.gain == 1 and first.shift == 0 and first.score.weight.abs().min() > 0


def test_loading_draws_no_random_numbers(folder):
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    checkpoint.load(folder)
    assert torch.equal(torch.rand(3), expected)


def test_extra_files_and_special_ids(tiny_gpt, tmp_path):
    checkpoint.save(
        tiny_gpt,
        tmp_path / "m",
        {
            "run.json": {"seed": 1},
            "tokenizer.tiktoken": b"\x00\xff",
            "log.jsonl": "é\n",
            "eos_token_id": 9,
        },
    )
    stamp = json.loads((tmp_path / "m/run.json").read_text())
    there = sorted(p.name for p in (tmp_path / "m").iterdir())
    assert stamp["seed"] == 1 and stamp["files"] == there
    assert (tmp_path / "m/tokenizer.tiktoken").read_bytes() == b"\x00\xff"
    assert (tmp_path / "m/log.jsonl").read_bytes() == "é\n".encode()
    config = json.loads((tmp_path / "m/config.json").read_text())
    assert config["eos_token_id"] == 9 and "bos_token_id" not in config


# --- writing whole or not at all ----------------------------------------------------------------------------


def test_older_checkpoint_is_replaced_and_nothing_is_left_beside(tiny_gpt, folder):
    checkpoint.save(tiny_gpt, folder, {"old.txt": "x"})
    (folder / "notes.txt").write_text("mine")
    with torch.no_grad():
        tiny_gpt.wte.weight.add_(1.0)
    checkpoint.save(tiny_gpt, folder)
    assert same_bits(checkpoint.load(folder), tiny_gpt)
    assert [p.name for p in folder.parent.iterdir()] == ["model"]
    assert {p.name for p in folder.iterdir()} == {
        "config.json",
        "model.safetensors",
        "notes.txt",
        "run.json",
    }


def test_the_words_of_a_small_vocabulary_are_among_what_a_stage_writes(tiny_gpt, tmp_path):
    extra = from_ranks({bytes([b]): b for b in range(256)}, {"lamp", "burn"}).files()
    for _ in range(3):
        output.check_folder(tmp_path / "ppo", checkpoint.FILES)
        checkpoint.save(tiny_gpt, tmp_path / "ppo", extra)
        there = sorted(p.name for p in (tmp_path / "ppo").iterdir())
        assert there == [
            "config.json",
            "generation_config.json",
            "merges.txt",
            "model.safetensors",
            "run.json",
            "tokenizer.tiktoken",
            "tokenizer_config.json",
            "vocab.json",
            "words.txt",
        ]
        assert json.loads((tmp_path / "ppo/run.json").read_text())["files"] == there


def test_failed_save_leaves_the_older_checkpoint(tiny_gpt, folder):
    before = (folder / "model.safetensors").read_bytes()
    with torch.no_grad():
        tiny_gpt.wte.weight.add_(1.0)
    with pytest.raises(TypeError):
        checkpoint.save(tiny_gpt, folder, {"run.json": {"not for JSON": object()}})
    assert (folder / "model.safetensors").read_bytes() == before
    checkpoint.load(folder)


def test_folder_that_is_no_checkpoint_is_not_replaced(tiny_gpt, tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(UserError, match="give a new folder"):
        checkpoint.save(tiny_gpt, tmp_path)
    with pytest.raises(UserError, match="is a file"):
        checkpoint.save(tiny_gpt, tmp_path / "thesis.tex")
    assert (tmp_path / "thesis.tex").read_text() == "years of work"
    (tmp_path / "empty").mkdir()
    checkpoint.save(tiny_gpt, tmp_path / "empty")


# --- other layouts ------------------------------------------------------------------------------------------


def test_names_without_prefix_and_buffers_and_tied_head_are_read(tiny_gpt, folder):
    """As in the file that is published for GPT-2."""

    def change(tensors):
        for key in list(tensors):
            tensors[key.removeprefix("transformer.")] = tensors.pop(key)
        for layer in range(2):
            tensors[f"h.{layer}.attn.bias"] = torch.ones(1, 1, 64, 64).tril()
            tensors[f"h.{layer}.attn.masked_bias"] = torch.tensor(-1e4)
        tensors["lm_head.weight"] = tensors["wte.weight"].clone()

    edit_weights(folder, change)
    assert same_bits(checkpoint.load(folder), tiny_gpt)


def test_the_head_alone_is_the_embedding_too(tiny_gpt, folder):
    """As safetensors' save_model leaves it: of two names of one tensor it keeps one."""
    edit_weights(folder, lambda t: t.update({"lm_head.weight": t.pop("transformer.wte.weight")}))
    assert same_bits(checkpoint.load(folder), tiny_gpt)
    edit_config(folder, tie_word_embeddings=False)
    refuse(folder, "wte.weight is missing")


def test_both_names_of_the_tanh_gelu_are_read(tiny_gpt, folder):
    edit_config(folder, activation_function="gelu_pytorch_tanh")
    assert same_bits(checkpoint.load(folder), tiny_gpt)


def test_sharded_weights_are_read(tiny_gpt, folder):
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = {k: f"model-0000{1 + i % 2}-of-00002.safetensors" for i, k in enumerate(tensors)}
    for shard in set(names.values()):
        save_file({k: v for k, v in tensors.items() if names[k] == shard}, folder / shard)
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": names}))
    assert same_bits(checkpoint.load(folder), tiny_gpt)
    (folder / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(UserError, match="model-00002-of-00002.safetensors: no such file"):
        checkpoint.load(folder)
    index.write_text(json.dumps({"weight_map": {"wte.weight": "../elsewhere.safetensors"}}))
    with pytest.raises(UserError, match="only .safetensors files beside it"):
        checkpoint.load(folder)


def test_half_precision_weights_become_float32(tiny_gpt, folder):
    edit_weights(
        folder, lambda tensors: tensors.update({k: v.bfloat16() for k, v in tensors.items()})
    )
    loaded = checkpoint.load(folder)
    assert loaded.wte.weight.dtype == torch.float32
    assert same_bits(loaded, tiny_gpt.bfloat16().float())


@pytest.mark.parametrize("tied", [True, False])
def test_rows_without_a_token_are_kept_and_get_no_logits(tmp_path, tied):
    """A vocabulary of 257 tokens under 300 rows, as where their number was rounded up."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(vocab_size=300, block_size=16, n_layer=1, n_head=2, n_embd=8, tied=tied))
    checkpoint.save(model, tmp_path / "m", from_ranks({bytes([b]): b for b in range(256)}).files())
    loaded = checkpoint.load(tmp_path / "m")
    logits = loaded.unembed(loaded(IDS))
    assert logits.shape == (1, 8, 257)
    assert torch.equal(logits, model.unembed(model(IDS))[..., :257])
    checkpoint.save(loaded, tmp_path / "again")
    assert same_bits(checkpoint.load(tmp_path / "again"), model)
    assert checkpoint.load(tmp_path / "m", scalar=True, new_head=True).gpt.tokens == 257


@pytest.mark.parametrize("rows, tokens", [(50304, 50257), (50257, 50257), (50, 50)])
def test_without_a_vocabulary_the_tokens_are_gpt2s(tmp_path, rows, tokens):
    model = GPT(GPTConfig(vocab_size=rows, block_size=4, n_layer=1, n_head=1, n_embd=2))
    checkpoint.save(model, tmp_path / "m")
    loaded = checkpoint.load(tmp_path / "m")
    assert (
        loaded.unembed(torch.zeros(1, 2)).shape == (1, tokens) and loaded.config.vocab_size == rows
    )


# --- broken folders: one line, which names the file and the fault -------------------------------------------


def refuse(folder, *words):
    with pytest.raises(UserError) as caught:
        checkpoint.load(folder)
    message = str(caught.value)
    assert "\n" not in message
    for word in (str(folder), *words):
        assert word in message, message


def test_missing_folder_or_file(folder, tmp_path):
    refuse(tmp_path / "nowhere", "no such folder")
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    refuse(folder, "model.safetensors", "no such file", "pickled")
    (folder / "config.json").unlink()
    refuse(folder, "config.json", "no such file")


@pytest.mark.parametrize("text", ["", "{", "[1]", "\udcff"])
def test_config_that_is_no_json_object(folder, text):
    (folder / "config.json").write_bytes(text.encode("utf-8", "surrogateescape"))
    refuse(folder, "config.json", "not")


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"model_type": "llama"}, ["model_type", "'llama'"]),
        ({"model_type": None}, ["model_type"]),
        ({"n_head": None}, ["n_head", "missing"]),
        ({"n_layer": "two"}, ["n_layer", "'two'"]),
        ({"n_layer": 0}, ["n_layer", "0"]),
        ({"n_head": 5}, ["n_embd is 32", "n_head 5"]),
        ({"activation_function": "relu"}, ["activation_function", "'relu'"]),
        ({"scale_attn_by_inverse_layer_idx": True}, ["scale_attn_by_inverse_layer_idx"]),
        ({"n_inner": 64}, ["n_inner", "64"]),
        ({"layer_norm_epsilon": "small"}, ["layer_norm_epsilon", "'small'"]),
        *(
            ({"layer_norm_epsilon": x}, ["layer_norm_epsilon", "above 0 and below 1"])
            for x in (0, 0.0, -1e-5, 1, 1.5, float("nan"), float("inf"), True)
        ),
        *(
            ({name: number}, [f"{name} is {number}", "at most"])
            for name, number in (
                ("n_embd", 10**12),
                ("vocab_size", 2**63),
                ("n_positions", 10**30),
                ("n_layer", 100_000),
            )
        ),
    ],
)
def test_config_of_another_architecture(folder, changes, words):
    edit_config(folder, **changes)
    refuse(folder, "config.json", *words)


@pytest.mark.parametrize("keep", [0, 7, 100, -100])
def test_truncated_weights(folder, keep):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    refuse(folder, "model.safetensors", "cannot be read")


def test_wrong_shape_names_both(folder):
    edit_weights(
        folder, lambda t: t.update({"transformer.h.1.mlp.c_fc.weight": torch.zeros(32, 127)})
    )
    refuse(folder, "h.1.mlp.c_fc.weight", "(32, 127)", "(32, 128)")


def test_config_that_does_not_fit_the_weights(folder):
    edit_config(folder, vocab_size=65)
    refuse(folder, "wte.weight", "(64, 32)", "(65, 32)")
    edit_config(folder, vocab_size=64, n_layer=3)
    refuse(folder, "h.2.attn.c_attn.bias", "missing")
    edit_config(folder, n_layer=1)
    refuse(folder, "h.1.attn.c_attn.bias", "does not belong")


def test_untied_head_and_foreign_weights(folder):
    edit_weights(folder, lambda t: t.update({"lm_head.weight": torch.zeros(64, 32)}))
    refuse(folder, "config.json", "lm_head.weight differs", "write false there")
    edit_weights(
        folder,
        lambda t: t.update(
            {"lm_head.weight": t["transformer.wte.weight"].clone(), "extra.weight": torch.zeros(1)}
        ),
    )
    refuse(folder, "extra.weight")


@pytest.mark.parametrize(
    "prefix, inner",
    [
        ("_orig_mod.", "_orig_mod"),
        ("module.", "module"),
        ("pretrained_model.", "pretrained_model"),
        ("base_model.model.", "merge_and_unload()"),
    ],
)
def test_a_wrapped_model_is_told(folder, prefix, inner):
    edit_weights(folder, lambda t: [t.update({prefix + name: t.pop(name)}) for name in list(t)])
    refuse(folder, f"weights are named {prefix}*", f"save the model inside it, its .{inner}")


def test_an_adapter_alone_is_told(tmp_path):
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    with pytest.raises(UserError, match="is an adapter without .* merge_and_unload"):
        checkpoint.load(tmp_path)


def test_a_value_head_beside_a_model_is_told(folder):
    edit_weights(folder, lambda t: t.update({"v_head.summary.weight": torch.zeros(1, 32)}))
    refuse(folder, "weights are named v_head.*", "its .pretrained_model")


def test_another_librarys_reward_model_is_told(folder):
    edit_weights(folder, lambda t: t.update({"score.weight": torch.zeros(1, 32)}))
    refuse(folder, "is another library's reward model", "give a language model")
    with pytest.raises(
        UserError, match="another library's reward model.*give what train_pm.py has made"
    ):
        checkpoint.load(folder, scalar=True)


def test_scalar_head_with_a_part_missing(tiny_gpt, tmp_path):
    checkpoint.save(ScalarModel(tiny_gpt), tmp_path / "pm")
    edit_weights(tmp_path / "pm", lambda t: t.pop("score.gain"))
    with pytest.raises(UserError, match="gain is missing"):
        checkpoint.load(tmp_path / "pm", scalar=True)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_weights_that_are_no_numbers_are_told(tiny_gpt, tmp_path, bad):
    tiny_gpt.h[1].ln_1.bias.data[3] = bad
    checkpoint.save(tiny_gpt, tmp_path / "model")
    with pytest.raises(UserError, match="weight h.1.ln_1.bias holds NaN or infinity"):
        checkpoint.load(tmp_path / "model")


@pytest.mark.parametrize("dtype", [torch.int8, torch.int32, torch.bool, torch.complex64])
def test_weights_of_whole_numbers_are_told(folder, dtype):
    wrong = torch.ones(64, 32, dtype=dtype)
    edit_weights(folder, lambda t: t.update({"transformer.wpe.weight": wrong}))
    refuse(folder, f"wpe.weight is of {str(dtype)[6:]}", "floating-point")


def test_weights_that_overflow_are_told(folder):
    for number, dtype in ((3e38, torch.float32), (-1e8, torch.bfloat16), (1e300, torch.float64)):
        wrong = torch.full((64, 32), number, dtype=dtype)
        edit_weights(folder, lambda t, wrong=wrong: t.update({"transformer.wpe.weight": wrong}))
        told = "NaN or infinity" if number > 1e40 else f"{float(wrong[0, 0]):.3g}"
        refuse(folder, f"weight wpe.weight holds {told}")


def test_a_language_model_is_no_preference_model(tiny_gpt, tmp_path):
    checkpoint.save(tiny_gpt, tmp_path / "model")
    with pytest.raises(
        UserError, match="is a language model, without .* head; give what train_pm.py"
    ):
        checkpoint.load(tmp_path / "model", scalar=True)


def test_what_is_loaded_stays_when_the_file_is_written_over(tiny_gpt, tmp_path):
    checkpoint.save(tiny_gpt, tmp_path / "model")
    loaded = checkpoint.load(tmp_path / "model")
    file = tmp_path / "model" / "model.safetensors"
    with open(file, "r+b") as raw:  # in place, as cp does it
        raw.seek(file.stat().st_size // 2)
        raw.write(bytes(file.stat().st_size // 2))
    for a, b in zip(loaded.parameters(), tiny_gpt.parameters()):
        assert torch.equal(a, b)


def test_saved_weights_honour_the_umask(tiny_gpt, tmp_path):
    before = os.umask(0o027)
    try:
        checkpoint.save(tiny_gpt, tmp_path / "model")
    finally:
        os.umask(before)
    modes = {path.stat().st_mode & 0o777 for path in (tmp_path / "model").iterdir()}
    assert modes == {0o640} and os.umask(before) == before


def test_a_file_that_may_not_be_read_is_not_called_missing(tiny_gpt, tmp_path, monkeypatch):
    """Root may read everything, so the answer of the system is pretended."""
    checkpoint.save(tiny_gpt, tmp_path / "model")

    def refused(path):
        raise FileNotFoundError(f"No such file or directory: {path}")  # as safetensors tells it

    monkeypatch.setattr(checkpoint, "load_file", refused)
    monkeypatch.setattr(os, "access", lambda path, mode: not str(path).endswith(".safetensors"))
    with pytest.raises(UserError, match=r"model.safetensors: cannot be read \(Permission denied\)"):
        checkpoint.load(tmp_path / "model")


def test_opening_a_model_imports_no_compiler_and_draws_nothing(tmp_path, tiny_gpt):
    """The import would take longer than all the rest of a small model's loading."""
    checkpoint.save(tiny_gpt, tmp_path / "m")
    code = """
import sys, torch
from mincai.plumbing.checkpoint import load
before = torch.random.get_rng_state()
load(sys.argv[1])
assert torch.equal(torch.random.get_rng_state(), before)
assert "torch._dynamo" not in sys.modules
"""
    command = [sys.executable, "-c", code, str(tmp_path / "m")]
    root = Path(__file__).resolve().parents[2]
    ran = subprocess.run(command, cwd=root, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
