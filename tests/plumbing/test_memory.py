"""The plan of memory against exact counts, hand arithmetic, and what torch keeps for backward."""

import re
from dataclasses import dataclass

import pytest
import torch

from mincai import UserError
from mincai.model import GPT, GPTConfig, ScalarModel, attention_mask, positions_of
from mincai.plumbing import cli, memory

TINY = GPTConfig(vocab_size=998, block_size=256, n_layer=4, n_head=4, n_embd=128)
SIZES = {
    "gpt2": (12, 12, 768, 124_439_808),
    "gpt2-medium": (24, 16, 1024, 354_823_168),
    "gpt2-large": (36, 20, 1280, 774_030_080),
    "gpt2-xl": (48, 25, 1600, 1_557_611_200),
}
STAGES = ("sample", "sft", "pm", "ppo")


@dataclass(frozen=True)
class Nothing:
    """A Config without flags."""


def config_of(size):
    return GPTConfig(n_layer=SIZES[size][0], n_head=SIZES[size][1], n_embd=SIZES[size][2])


def on_meta(config):
    with torch.device("meta"):  # shapes without memory
        return GPT(config)


# --- what is exact ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", SIZES)
def test_parameters_of_the_published_sizes(size):
    assert memory.parameters(config_of(size)) == SIZES[size][3]
    assert sum(p.numel() for p in on_meta(config_of(size)).parameters()) == SIZES[size][3]


def test_parameters_of_a_small_model_and_of_its_head(tiny_config):
    for config in (tiny_config, TINY):
        assert memory.parameters(config) == sum(p.numel() for p in on_meta(config).parameters())
    with torch.device("meta"):
        pm = ScalarModel(GPT(TINY))
    lines = memory.plan("pm", TINY, batch=1, length=8)
    assert lines["model: weights"] == 4 * sum(p.numel() for p in pm.parameters())


def test_gpt2s_cache_and_optimiser_by_hand():
    """124,439,808 numbers of 4 bytes; 2 (keys, values) * 12 blocks * 64 rows * 256 tokens * 768
    numbers of 4 bytes."""
    gpt2 = config_of("gpt2")
    lines = memory.plan("sft", gpt2, batch=8, length=256)
    assert lines["model: weights"] == lines["model: gradients"] == 497_759_232
    assert lines["model: AdamW's two moments"] == 995_518_464
    assert memory.plan("sample", gpt2, batch=64, length=256)["KV cache"] == 1_207_959_552
    assert (
        memory.plan("sample", gpt2, batch=64, length=256, dtype="bfloat16")["KV cache"]
        == 603_979_776
    )


def test_logits_by_hand():
    """Four tensors of 2 rows * 256 tokens * 50257 numbers of 4 bytes; PPO makes them of the
    answer's 64 tokens only."""
    gpt2 = config_of("gpt2")
    assert memory.plan("sft", gpt2, batch=8, micro_batch=2, length=256)["logits"] == 411_705_344
    assert (
        memory.plan("ppo", gpt2, batch=8, micro_batch=2, length=256, answer=64)["logits"]
        == 102_926_336
    )
    assert "logits" not in memory.plan("pm", gpt2, batch=8, length=256)  # a score is one number


def test_ppo_holds_four_networks_two_of_which_learn():
    lines = memory.plan("ppo", TINY, batch=4, length=64)
    count = memory.parameters(TINY)
    assert (
        lines["policy: weights"]
        == lines["policy: gradients"]
        == lines["reference: weights"]
        == 4 * count
    )
    assert (
        lines["critic: AdamW's two moments"] == 8 * (count + 129) == 2 * lines["critic: gradients"]
    )
    assert lines["preference model: weights"] == 4 * (count + 129)
    assert not {"reference: gradients", "preference model: gradients"} & set(lines)


# --- activations --------------------------------------------------------------------------------------------


def kept_for_backward(model, forward):
    """Bytes of all tensors that autograd keeps of a forward, the weights themselves and copies of
    them left out."""
    shapes = {tuple(p.shape) for p in model.parameters()} | {
        tuple(p.shape[::-1]) for p in model.parameters()
    }
    storages = {}

    def keep(tensor):
        if tuple(tensor.shape) not in shapes:
            storages[tensor.untyped_storage().data_ptr()] = (
                tensor.untyped_storage()
            )  # held, so that none is used again
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        hidden = forward()
    assert hidden.requires_grad
    return sum(storage.nbytes() for storage in storages.values())


@pytest.mark.parametrize("dtype_bytes", [4, 2])
@pytest.mark.parametrize("masked", [False, True])
def test_a_block_keeps_what_the_formula_says(dtype_bytes, masked):
    """A model of four blocks less one of two: what is kept outside of the blocks falls out."""
    B, T = 3, 40
    valid = torch.ones(B, T, dtype=torch.bool)
    more = (positions_of(valid), attention_mask(valid)) if masked else ()
    ids = torch.zeros(B, T, dtype=torch.long)
    found = []
    for n_layer in (4, 2):
        model = GPT(GPTConfig(vocab_size=50, block_size=64, n_layer=n_layer, n_head=4, n_embd=128))
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype_bytes == 2):
            found.append(kept_for_backward(model, lambda: model(ids, *more)))
    block = memory.block_bytes(model.config, T, dtype_bytes, masked)
    assert found[0] - found[1] == pytest.approx(2 * B * T * block, rel=0.02)


def test_activations_are_those_of_the_micro_batch_only():
    def activations(stage="sft", **sizes):
        return memory.plan(stage, TINY, length=64, **sizes)["activations"]

    assert (
        activations(batch=32, micro_batch=4)
        == activations(batch=4)
        == activations(batch=4, micro_batch=8)
    )
    assert activations(batch=8) == 2 * activations(batch=4)
    masks = 5 * 8 * 64 * 64 * 4  # of five blocks, eight rows: 64 numbers a query
    assert activations("pm", batch=4) == activations(batch=8) + masks  # a pair is two rows
    blocks = memory.block_bytes(TINY, 64) * 4 * 64  # of four rows
    assert activations(batch=4) == 5 * blocks + 4 * 64 * 128 * 8


def test_bfloat16_saves_activations_and_costs_copies_of_weights():
    gpt2 = config_of("gpt2")
    full, half = (
        memory.plan("sft", gpt2, batch=4, length=512, dtype=d) for d in ("float32", "bfloat16")
    )
    assert 0.5 < half["activations"] / full["activations"] < 0.6
    assert half["model: weights"] == full["model: weights"]
    assert half["16-bit copies of weights"] == 2 * (
        124_439_808 - (50257 + 1024) * 768
    )  # none of the embeddings
    judge = memory.plan("sample", gpt2, batch=4, length=512, dtype="bfloat16", models=2)
    assert judge["16-bit copies of weights"] == 2 * half["16-bit copies of weights"]


# --- the whole ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", STAGES)
def test_more_rows_and_longer_rows_need_more(stage):
    def need(**sizes):
        return memory.needed(memory.plan(stage, TINY, **{"batch": 64, "length": 64, **sizes}))

    assert need() < need(batch=256) < need(batch=1024)
    assert need() < need(length=128) < need(length=256)
    assert need(micro_batch=16) <= need(micro_batch=32) <= need()
    assert all(
        isinstance(n, int) and n > 0 for n in memory.plan(stage, TINY, batch=3, length=5).values()
    )


def test_turns_are_not_added_up():
    """Sampling needs 12, learning 11 beside what stays: 12 + 100, not 123."""
    lines = {
        "policy: weights": 100,
        "KV cache": 10,
        "drawing tokens": 2,
        "activations": 7,
        "logits": 4,
    }
    assert memory.needed(lines) == 112


@pytest.mark.parametrize("stage", STAGES)
def test_every_line_that_takes_turns_is_known_to_a_plan(stage):
    """Guards the names in TURNS: a misspelt one would count as staying."""
    named = {name for names in memory.TURNS.values() for name in names}
    lines = set(memory.plan(stage, TINY, batch=2, length=8, dtype="bfloat16", reads_on=True))
    assert {name for name in lines if ":" not in name} - {"16-bit copies of weights"} <= named
    if stage == "ppo":
        assert named <= lines


def test_table_names_every_line_and_the_total():
    lines = memory.plan("ppo", config_of("gpt2"), batch=64, length=256, micro_batch=8, answer=128)
    text = memory.table(lines).splitlines()
    assert len(text) == len(lines) + 2 and all(name in row for name, row in zip(lines, text[1:]))
    assert re.search(r"policy: weights +0\.498 GB$", text[1])
    assert re.search(r"KV cache +1\.2 GB  while sampling$", "\n".join(text), re.M)
    assert text[-1].split() == [
        "at",
        "most",
        "at",
        "once",
        f"{memory.needed(lines) / 1e9:.1f}",
        "GB",
    ]


# --- too little ---------------------------------------------------------------------------------------------

PLAN = {"model: weights": 6_000_000_000, "activations": 30_000_000_000}
FLAGS = "--micro-batch, --batch or --max-new"


def test_enough_memory_passes_and_on_the_cpu_nothing_is_checked():
    memory.check(PLAN, 36_000_000_000, FLAGS)
    memory.check(PLAN, None, FLAGS)


def test_too_little_memory_is_told_with_both_numbers_and_flags():
    with pytest.raises(
        UserError,
        match=r"needs about 36\.0 GB of GPU memory and 24\.0 GB are free; lower "
        r"--micro-batch, --batch or --max-new, or take a smaller model$",
    ):
        memory.check(PLAN, 24_000_000_000, FLAGS)
    with pytest.raises(UserError, match="lower --batch-size, or take"):
        memory.check(PLAN, 24_000_000_000, flags="--batch-size")


def test_no_flag_is_advised_where_the_weights_alone_do_not_fit():
    with pytest.raises(UserError, match=r"alone take 6\.0 GB, so take a smaller model$") as error:
        memory.check(PLAN, 5_000_000_000, FLAGS)
    assert "--" not in str(error.value)


def test_what_is_available(monkeypatch):
    """What torch has reserved and does not use is free for it: 10 + 3 - 1."""
    assert memory.available("cpu") is None
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda index: (10 + index, 80))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda index: 3)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda index: 1)
    assert memory.available("cuda") == 12 and memory.available("cuda:2") == 14


def test_out_of_memory_is_one_line_that_says_what_to_do(capsys):
    def main(cfg):
        raise torch.cuda.OutOfMemoryError(
            "CUDA out of memory. Tried to allocate 2.50 GiB. GPU 0 has a total capacity "
            "of 79.10 GiB of which 1.00 GiB is free.\nMore."
        )

    with pytest.raises(SystemExit) as exit:
        cli.run(main, Nothing, argv=[])
    assert exit.value.code == 2
    assert capsys.readouterr().err == (
        "mincai: error: the GPU is out of memory (it was asked for 2.50 GiB more); lower --micro-batch, --batch-size "
        "or --max-new, where it has them; finished stages are kept\n"
    )


def test_other_errors_pass_as_they_are():
    def main(cfg):
        raise RuntimeError("shapes")

    with pytest.raises(RuntimeError, match="shapes"):
        cli.run(main, Nothing, argv=[])


def test_more_models_and_a_second_cache_are_counted():
    one = memory.plan("sample", GPTConfig(), batch=8, length=100)
    more = memory.plan("sample", GPTConfig(), batch=8, length=100, models=3, reads_on=True)
    assert (
        more["model: weights"] == 3 * one["model: weights"]
        and more["KV cache, read on"] == one["KV cache"]
    )
    assert memory.needed(more) == memory.needed(one) + 2 * one["model: weights"] + one["KV cache"]
