"""What we export trains in TRL: one step each of its trainers for pairs, on folders that we saved.
Needs trl and datasets, which nothing else here does."""

import json
import os

import pytest
import torch

from mincai.model import GPT, GPTConfig, ScalarModel
from mincai.plumbing import checkpoint, formats
from mincai.plumbing.tokenizer import from_ranks

pytestmark = pytest.mark.slow
os.environ.update(HF_HUB_OFFLINE="1", TRANSFORMERS_VERBOSITY="error")
TOKENIZER = from_ranks({bytes([b]): b for b in range(256)})
ROWS = [
    {"prompt": f"may we {n} ?", "a": "yes , do .", "b": "no , that is wrong .", "p_a": p}
    for n, p in enumerate((0.1, 0.9, 0.5, 0.7, 0.2))
]


@pytest.fixture
def exported(tmp_path):
    """(rows for TRL, tokenizer with text's ends as ends, folders of a policy and of a reward
    model)."""
    datasets, transformers = pytest.importorskip("datasets"), pytest.importorskip("transformers")
    pytest.importorskip("trl")
    source, out = tmp_path / "rows.jsonl", tmp_path / "pairs.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    assert formats.main(formats.Config(str(source), str(out)))["written"] == 4
    rows = datasets.load_dataset(
        "json", data_files=str(out), split="train", cache_dir=str(tmp_path / "cache")
    )
    torch.manual_seed(0)
    gpt = GPT(GPTConfig(TOKENIZER.n_vocab, 128, 1, 1, 16))
    for name, model in (("sft", gpt), ("pm", ScalarModel(gpt))):
        checkpoint.save(model, tmp_path / name, TOKENIZER.files() | TOKENIZER.special())
    tokenizer = transformers.AutoTokenizer.from_pretrained(
        tmp_path / "sft", split_special_tokens=False
    )
    return rows, tokenizer, str(tmp_path / "sft"), str(tmp_path / "pm")


def settings(tmp_path):
    return dict(
        output_dir=str(tmp_path / "out"),
        max_steps=1,
        per_device_train_batch_size=4,
        report_to=[],
        use_cpu=True,
        bf16=False,
        disable_tqdm=True,
        save_strategy="no",
        logging_steps=1,
    )


def moved(trainer, before):
    after = trainer.model.state_dict()
    return any(not torch.equal(after[name].cpu(), value) for name, value in before.items())


def train(trainer):
    before = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    assert trainer.train().training_loss > 0
    assert moved(trainer, before)


def test_pairs_train_a_policy(exported, tmp_path):
    rows, tokenizer, sft, _ = exported
    import trl

    cfg = trl.DPOConfig(max_length=128, **settings(tmp_path))
    trainer = trl.DPOTrainer(sft, args=cfg, processing_class=tokenizer, train_dataset=rows)
    ids = trainer.train_dataset[0]["chosen_ids"]
    assert ids == [*TOKENIZER.encode(rows[0]["chosen"]), TOKENIZER.eot]
    train(trainer)


def test_pairs_train_a_reward_model(exported, tmp_path):
    rows, tokenizer, _, pm = exported
    import trl

    cfg = trl.RewardConfig(max_length=128, **settings(tmp_path))
    trainer = trl.RewardTrainer(pm, args=cfg, processing_class=tokenizer, train_dataset=rows)
    ids = trainer.train_dataset[0]["chosen_ids"]
    assert ids == [*TOKENIZER.encode(rows[0]["prompt"] + rows[0]["chosen"]), TOKENIZER.eot]
    train(trainer)
