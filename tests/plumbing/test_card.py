"""The model card: it says how a model was made, hubs read it, and a person's own is kept."""

import json
from dataclasses import dataclass, replace

import pytest
import torch

import train_pm
from mincai import DATA
from mincai.model import GPT, GPTConfig, ScalarModel
from mincai.plumbing import card, cli, data, stage
from mincai.plumbing.tokenizer import from_ranks, load_tokenizer
from mincai.tinyworld import pretrain

TOKENIZER = from_ranks({bytes([b]): b for b in range(256)}, {"lamp"})
METRICS = {"val_before": 2.5, "val_after": 1.23456, "rows": 12000, "held": 0, "loss": 1.0}


@dataclass(frozen=True)
class Config(stage.Settings):
    data: tuple[str, ...] = cli.arg(("rows.jsonl",), "rows")
    rounds: int = cli.arg(2, "rounds")
    whole: bool = cli.arg(True, "all")
    out: str = cli.arg("sft", "output")


@pytest.fixture
def made(tmp_path):
    """A function that runs a stage that trains nothing, into tmp_path/sft; what it returns."""
    (tmp_path / "rows.jsonl").write_text("{}\n")
    cfg = Config(
        seed=3,
        device="cpu",
        threads=1,
        data=(str(tmp_path / "rows.jsonl"),),
        whole=False,
        out=str(tmp_path / "sft"),
    )

    def run(**changes):
        begun = stage.begin("train_sft", replace(cfg, **changes))
        if begun is not None:
            model = GPT(GPTConfig(TOKENIZER.n_vocab, 8, 1, 1, 8))
            begun.save_model(model, TOKENIZER, METRICS, [])
        return begun

    return run


def test_it_says_how_the_model_was_made(made, tmp_path):
    made()
    text = (tmp_path / "sft" / "README.md").read_text(encoding="utf-8")
    for line in (
        "    python train_sft.py --seed 3 --data rows.jsonl --no-whole --out sft",
        f"- data: rows.jsonl, SHA-256 {data.inputs(Config(data=(str(tmp_path / 'rows.jsonl'),)))['data'][:12]}",
        f"- seed 3, mincai's commit {data._git_commit() or 'unknown'}, torch {torch.__version__}, cpu",
        "| held-out loss before, nats a token | 2.5 |",
        "| held-out loss after | 1.235 |",
        "| rows to train on | 12,000 |",
        "| rows held out | 0 |",
        "Nothing here measures real-world safety; put it in front of nobody as a safeguard.",
        "It knows the words of words.txt and no others.",
        "license: mit",
        "library_name: transformers",
        "pipeline_tag: text-generation",
    ):
        assert line in text.splitlines(), (line, text)
    assert str(tmp_path) not in text  # where it lay is nobody's business
    listed = json.loads((tmp_path / "sft" / "run.json").read_text())
    assert "README.md" in listed["files"] and len(text.split()) < 300


def test_the_shipped_base_has_the_card_and_the_vocabulary_of_today():
    """What pretraining would write beside the weights, for other libraries too."""
    folder = DATA / "tiny"
    run = json.loads((folder / "run.json").read_text())
    log = data.read_jsonl(folder / "metrics.jsonl")
    kept = {k: v for k, v in run["config"].items() if k in vars(pretrain.Config())}
    files = load_tokenizer(folder).files()
    files["README.md"] = card.written(
        "pretrain", pretrain.Config(**kept), {**run, "metrics": log[-1]}, True
    ).encode()
    for name, content in files.items():
        assert (folder / name).read_bytes() == content and name in run["files"]


def test_a_hub_reads_its_head(made, tmp_path):
    hub = pytest.importorskip("huggingface_hub")
    made()
    found = hub.ModelCard.load(tmp_path / "sft" / "README.md").data.to_dict()
    assert found == {
        "license": "mit",
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["gpt2", "constitutional-ai", "rlaif"],
    }


def test_a_preference_models_card_has_its_own_figures_and_use():
    cfg = train_pm.Config()
    stamp = {
        "seed": 0,
        "git": None,
        "torch": "2",
        "device": "cpu",
        "metrics": {"val_accuracy": 0.7},
    }
    text = card.written("train_pm", cfg, stamp, few_words=False)
    assert "| held-out pairs on which it prefers what the label prefers | 0.7 |" in text
    assert "    python train_pm.py\n" in text and "reward-model" in text
    assert "pipeline_tag" not in text and "words.txt" not in text
    assert "AutoModelForSequenceClassification" in text


def test_its_code_runs(tmp_path, monkeypatch):
    pytest.importorskip("transformers")
    monkeypatch.setenv("TRANSFORMERS_VERBOSITY", "error")
    torch.manual_seed(0)
    model = ScalarModel(GPT(GPTConfig(TOKENIZER.n_vocab, 256, 1, 1, 8)))
    for name, net, code in (("pm", model, card.SCORE), ("sft", model.gpt, card.LANGUAGE)):
        out = str(tmp_path / name)
        begun = stage.begin("train_sft", Config(device="cpu", threads=1, out=out))
        begun.save_model(net, TOKENIZER, METRICS, [])
        *before, last = code.replace("pipeline(", "pipeline(device='cpu', task=").split("\n")
        names = {"FOLDER": out}
        exec("\n".join(before), names)
        found = eval(last, names)
        if name == "pm":
            ids = torch.tensor([names["ids"]])
            torch.testing.assert_close(found, model(ids)[0, -1], atol=1e-5, rtol=1e-5)
        else:
            assert isinstance(found[0]["generated_text"], str)


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_persons_own_is_kept_and_stops_nothing(made, tmp_path, when):
    """Put there before the first run, or written over ours: then the run is still what was made."""
    mine = tmp_path / "sft" / "README.md"
    if when == "before":
        mine.parent.mkdir()
        mine.write_text("mine")
    made()
    mine.write_text("mine")
    for again in (False, True, False, True):
        assert (made(again=again) is not None) == again
        assert mine.read_text() == "mine"
        assert "README.md" not in json.loads((mine.parent / "run.json").read_text())["files"] or (
            not again
        )
    mine.unlink()
    assert made() is None
    made(again=True)
    assert mine.read_text().startswith("---\nlicense")
