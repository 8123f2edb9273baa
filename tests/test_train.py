"""The three training scripts, called in-process on a byte-level vocabulary and a random GPT of two layers."""

import base64
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import train_pm
import train_ppo
import train_sft
from mincai import UserError, checkpoint, cli, data
from mincai.constitution import dialogue
from mincai.model import GPT, GPTConfig, ScalarModel
from mincai.tokenizer import from_ranks, load_tokenizer

ROOT = Path(__file__).resolve().parents[1]
EOT = 256
QUIET = dict(device="cpu", threads=1)


@pytest.fixture
def base(tmp_path):
    """A checkpoint folder of random weights with a vocabulary of the 256 bytes and end-of-text."""
    torch.manual_seed(0)
    ranks = b"".join(base64.b64encode(bytes([b])) + b" %d\n" % b for b in range(256))
    model = GPT(GPTConfig(vocab_size=257, block_size=64, n_layer=2, n_head=2, n_embd=32))
    checkpoint.save(model, tmp_path / "base", extra={"tokenizer.tiktoken": ranks})
    return str(tmp_path / "base")


@pytest.fixture
def revisions(tmp_path):
    rows = [{"id": f"p{i}", "prompt": f"q{i} ?", "original": "x", "revision": f"no {i} .", "kind": "harmful",
             "round": 1} for i in range(10)]
    data.write_jsonl(tmp_path / "revisions.jsonl", rows)
    return str(tmp_path / "revisions.jsonl")


@pytest.fixture
def pairs(tmp_path):
    """The planted rule: the judge likes an answer with a "y". One pair is too long, one has equal answers."""
    rows = []
    for i in range(40):
        a, b = list(b" ay") + [97 + i % 20, EOT], list(b" a") + [98 + i % 20, 97, EOT]
        a, b = (a, b) if i % 2 else (b, a)
        rows.append({"id": f"p{i // 2}", "prompt": f"q{i // 2}", "a": "", "b": "", "a_ids": a, "b_ids": b,
                     "p_a": 0.9 if 121 in a else 0.1, "principle": "x"})
    rows.append({**rows[0], "a_ids": [97] * 70})
    rows.append({**rows[0], "a_ids": rows[0]["b_ids"]})
    data.write_jsonl(tmp_path / "comparisons.jsonl", rows)
    return str(tmp_path / "comparisons.jsonl")


@pytest.fixture
def prompts(tmp_path):
    rows = [{"id": f"p{i}", "prompt": f"q{i}", "kind": "harmful" if i % 2 else "benign", "category": "x",
             "attack": "", "split": "loop" if i < 8 else "test"} for i in range(10)]
    data.write_jsonl(tmp_path / "prompts.jsonl", rows)
    return str(tmp_path / "prompts.jsonl")


def sft(base, revisions, out, **more):
    settings = dict(base=base, data=(revisions,), out=str(out), epochs=1, batch_size=4) | QUIET | more
    return train_sft.Config(**settings)


def planted_pm(folder, base):
    """A preference model whose score says nothing yet; its weights are random."""
    torch.manual_seed(1)
    checkpoint.save(ScalarModel(checkpoint.load(base)), folder, load_tokenizer(base).files())
    return str(folder)


def ppo(base, pm, prompts, out, **more):
    settings = dict(sft=base, pm=pm, prompts=prompts, out=str(out), updates=2, batch=8, max_new=4,
                    micro_batch=4, freeze=0)
    return train_ppo.Config(**settings | QUIET | more)


def weights(folder):
    return (Path(folder) / "model.safetensors").read_bytes()


def rows_of(path):
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


# --- fine-tuning ------------------------------------------------------------------------------------------

def test_sft_overfits_one_batch(base, revisions, tmp_path):
    metrics = train_sft.main(sft(base, revisions, tmp_path / "sft", epochs=80, batch_size=16, holdout=0.0,
                                 lr=0.01))
    assert metrics["loss"] < 0.1 and metrics["held"] == 0
    model, tokenizer = checkpoint.load(tmp_path / "sft"), load_tokenizer(tmp_path / "sft")
    ids = tokenizer.encode(dialogue("q3 ?"))
    for _ in range(len(" no 3 .") + 1):
        ids.append(int(model.unembed(model(torch.tensor([ids])))[0, -1].argmax()))
    assert tokenizer.decode(ids).endswith("Assistant: no 3 .") and ids[-1] == EOT  # it learned to stop


def test_sft_trains_the_answer_and_its_end_only(base):
    """A row's targets are its answer and end-of-text; revision_ids, where given, are taken as they are."""
    tokenizer = load_tokenizer(base)
    rows = [{"prompt": "q", "revision": "ab"}, {"prompt": "q", "revision": "ab", "revision_ids": [7, 8, EOT]},
            {"prompt": "q" * 60, "revision": "ab"}, {"prompt": "q", "revision": "ab", "changed": False}]
    kept, dropped, unchanged = train_sft.examples(rows, tokenizer, 64)
    assert unchanged == 1  # no round revised it: nothing to learn
    assert [answer for _, _, answer in kept] == [list(b" ab") + [EOT], [7, 8, EOT]] and dropped == 1
    ids, targets, loss_mask = data.sft_batch([row[1:] for row in kept])
    assert targets[0][loss_mask[0]].tolist() == kept[0][2]


def test_sft_accumulation_equals_the_big_batch(base, tmp_path):
    """One divisor for the step: a mean of the forward passes' means would weigh short answers more. Loss and
    gradient are compared, not weights: Adam would hide a gradient that is only scaled."""
    rows = [{"prompt": "q", "revision": "ab " * n} for n in range(1, 13)]
    data.write_jsonl(tmp_path / "ragged.jsonl", rows)
    steps = []
    for batch_size, accumulate in ((12, 1), (4, 3)):
        out = tmp_path / f"sft-{accumulate}"
        train_sft.main(sft(base, str(tmp_path / "ragged.jsonl"), out, batch_size=batch_size,
                           accumulate=accumulate, holdout=0.0))
        steps.append(rows_of(out / "metrics.jsonl"))
    (big,), (parts,) = steps
    assert parts["tokens"] == big["tokens"]
    assert parts["loss"] == pytest.approx(big["loss"], rel=1e-5)
    assert parts["grad_norm"] == pytest.approx(big["grad_norm"], rel=1e-4)


def test_sft_replays_its_share(base, revisions, tmp_path):
    data.write_jsonl(tmp_path / "documents.jsonl", [{"text": "the sky is blue . " * n} for n in range(1, 6)])
    plain = train_sft.main(sft(base, revisions, tmp_path / "plain", holdout=0.0))
    mixed = train_sft.main(sft(base, revisions, tmp_path / "mixed", holdout=0.0, replay_share=0.2,
                               replay=str(tmp_path / "documents.jsonl")))
    answers, both = (sum(row["tokens"] for row in rows_of(tmp_path / name / "metrics.jsonl"))
                     for name in ("plain", "mixed"))
    assert plain["steps"] == mixed["steps"]
    # never less than the share, and over it by less than one piece (as long as the longest row)
    assert 0.25 * answers <= both - answers < 0.25 * answers + len(dialogue("q0 ?") + " no 0 ." + "!")


def test_sft_holds_prompts_out_whole():
    rows = [(f"p{i % 20}", [1], [2]) for i in range(100)]
    train, held = data.split(rows, [row[0] for row in rows], 0.1, seed=0)
    assert len(held) == 10 and not {r[0] for r in train} & {r[0] for r in held}


# --- preference model -------------------------------------------------------------------------------------

def test_pm_learns_the_planted_rule_and_is_normalised(base, pairs, tmp_path, capsys):
    cfg = train_pm.Config(init=base, pairs=(pairs,), out=str(tmp_path / "pm"), epochs=30, lr=0.003, freeze=0,
                          batch_size=16, **QUIET)
    metrics = train_pm.main(cfg)
    assert metrics["val_accuracy"] == 1.0 and metrics["dropped"] == {"too long": 1, "equal answers": 1, "undecided": 0}
    assert metrics["val_loss_floor"] == pytest.approx(0.3251, abs=1e-4)  # -0.9 ln 0.9 - 0.1 ln 0.1
    assert metrics["val_loss_floor"] <= metrics["val_loss"] < 0.4 and metrics["val_calibration_error"] < 0.15
    assert "NO better" not in capsys.readouterr().out
    pm, tokenizer = checkpoint.load(tmp_path / "pm", scalar=True), load_tokenizer(tmp_path / "pm")
    kept, _ = train_pm.read_pairs(pairs, tokenizer, 64)
    with torch.no_grad():  # each answer alone, unpadded
        scores = torch.stack([pm(torch.tensor([ids]), start=p.start)[0, -1] for p in kept for ids in (p.a, p.b)])
    assert float(scores.mean()) == pytest.approx(0, abs=1e-4)
    assert float(scores.std(unbiased=False)) == pytest.approx(1, abs=1e-4)


def test_pm_trains_only_what_is_not_frozen(base, pairs, tmp_path):
    cfg = train_pm.Config(init=base, pairs=(pairs,), out=str(tmp_path / "pm"), epochs=1, freeze=1, **QUIET)
    train_pm.main(cfg)
    before, after = checkpoint.load(base).state_dict(), checkpoint.load(cfg.out, scalar=True).gpt.state_dict()
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved and all(name.startswith(("h.1.", "ln_f.")) for name in moved)


def test_pm_score_does_not_depend_on_the_batch(base, pairs):
    pm, tokenizer = checkpoint.load(base, scalar=True), load_tokenizer(base)
    kept, _ = train_pm.read_pairs(pairs, tokenizer, 64)
    long = train_pm.Pair("p", kept[0].a + [65] * 20 + [EOT], kept[0].b, kept[0].start, 0.5, True, True)
    alone, _ = train_pm.scores_of(pm, kept[:1], "cpu")
    together, _ = train_pm.scores_of(pm, [kept[0], long], "cpu")
    torch.testing.assert_close(alone[0], together[0])


def test_length_correlation_by_hand():
    x = torch.tensor([1.0, 2.0, 3.0])
    assert train_pm.correlation(x, 2 * x + 1) == pytest.approx(1)
    assert train_pm.correlation(x, torch.ones(3)) == 0.0


def test_likelihood_tells_what_whole_answers_do_not_teach(base, pairs, prompts, tmp_path, monkeypatch):
    """All answers of the pairs are whole, so a score of values alone never learns to look at the order of words."""
    tokenizer, sft = load_tokenizer(base), str(tmp_path / "sft")
    kept, _ = train_pm.read_pairs(pairs, tokenizer, 64)
    data.write_jsonl(tmp_path / "liked.jsonl", [
        {"id": row["id"], "prompt": row["prompt"], "revision": "", "revision_ids": row["a_ids" if row["p_a"] > 0.5 else
                                                                                      "b_ids"]}
        for row in rows_of(pairs)[:40]])
    train_sft.main(train_sft.Config(base=base, data=(str(tmp_path / "liked.jsonl"),), out=sft, epochs=20, lr=0.003,
                                    **QUIET))

    def junk_wins(likelihood):
        """How often an answer that the judge likes scores below itself read backwards; and what training says."""
        out = tmp_path / f"pm{likelihood}"
        metrics = train_pm.main(train_pm.Config(init=sft, pairs=(pairs,), out=str(out), epochs=20, lr=0.003, freeze=0,
                                                likelihood=likelihood, **QUIET))
        pm = checkpoint.load(out, scalar=True)
        assert (pm.likelihood is None) == (likelihood == 0) == (not checkpoint.reads_likelihood(out))
        liked = [p.a if p.p_a > 0.5 else p.b for p in kept]
        junk = [[*ids[:p.start], *ids[-2:p.start - 1:-1], EOT] for p, ids in zip(kept, liked)]
        good, bad = train_pm.all_scores(pm, [train_pm.Pair("", a, b, p.start, 1.0, True, True)
                                             for p, a, b in zip(kept, liked, junk)], 16, "cpu")
        return float((bad > good).float().mean()), metrics
    planned = []  # what the memory plan was told
    monkeypatch.setattr(train_pm.memory, "announce", lambda *a, likelihood, **k: planned.append(likelihood))
    (without, plain), (with_it, more) = junk_wins(0.0), junk_wins(0.1)
    train_ppo.main(ppo(sft, str(tmp_path / "pm0.1"), prompts, tmp_path / "ppo1"))
    train_ppo.main(ppo(sft, str(tmp_path / "pm0.0"), prompts, tmp_path / "ppo0"))
    assert planned == [False, True, True, False]
    assert with_it < 0.1 and without > 0.3
    assert plain["likelihood"] == 0 and more["likelihood"] not in (0, 0.1)  # a weight that learns
    assert more["val_accuracy"] > 0.9


# --- reinforcement learning -------------------------------------------------------------------------------

def test_ppo_runs_and_writes_what_it_says(base, prompts, tmp_path):
    pm = planted_pm(tmp_path / "pm", base)
    train_ppo.main(ppo(base, pm, prompts, tmp_path / "ppo", snapshots=1, critic_warmup=1, kl_target=1.0))
    rows = rows_of(tmp_path / "ppo" / "metrics.jsonl")
    assert len(rows) == 2 and rows[0]["kl"] == rows[0]["kl_k3"] == rows[0]["kl_exact"] == 0.0
    for row in rows:
        assert row["first_ratio_error"] == row["first_approxkl"] == row["first_clipfrac"] == 0.0
    assert rows[1]["kl_exact"] == 0.0  # the first update was the critic's
    assert rows[1]["lr"] == pytest.approx(rows[0]["lr"] / 2) and rows[1]["beta"] < rows[0]["beta"]
    assert len(rows_of(tmp_path / "ppo" / "samples.jsonl")) == 3
    assert weights(tmp_path / "ppo") == weights(tmp_path / "ppo" / "snapshots" / "u002") != weights(base)
    assert not (tmp_path / "ppo.partial").exists()


def test_ppo_trains_only_what_is_not_frozen(base, prompts, tmp_path):
    """A reward that does not move the embeddings or the lowest block; by default two blocks stay."""
    pm = planted_pm(tmp_path / "pm", base)
    train_ppo.main(ppo(base, pm, prompts, tmp_path / "ppo", freeze=1))
    before, after = checkpoint.load(base).state_dict(), checkpoint.load(tmp_path / "ppo").state_dict()
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved and all(name.startswith(("h.1.", "ln_f.")) for name in moved)
    assert train_ppo.Config().freeze == 2


def test_ppo_warm_up_leaves_the_policy_and_moves_the_critic(base, prompts, tmp_path):
    pm, values = planted_pm(tmp_path / "pm", base), []
    for name, critic_lr in (("still", 0.0), ("moved", 0.01)):
        train_ppo.main(ppo(base, pm, prompts, tmp_path / name, critic_warmup=2, critic_lr=critic_lr))
        assert weights(tmp_path / name) == weights(base)
        values.append([row["values_mean"] for row in rows_of(tmp_path / name / "metrics.jsonl")])
    assert values[0][0] == values[1][0] and values[0][1] != values[1][1]


def test_ppo_draws_only_the_loop_split_in_the_asked_share(base, prompts):
    cfg = train_ppo.Config(prompts=prompts, max_new=4)
    harmful, benign, dropped = train_ppo.read_prompts(cfg, load_tokenizer(base), 64)
    assert len(harmful) == len(benign) == 4 and dropped == 0
    with pytest.raises(UserError, match="harmful"):
        train_ppo.read_prompts(cfg, load_tokenizer(base), 20)


def test_ppo_names_words_never_read(base, prompts, capsys):
    cfg, tokenizer = train_ppo.Config(sft=base, prompts=prompts, max_new=4), load_tokenizer(base)
    train_ppo.read_prompts(cfg, from_ranks(tokenizer.ranks, {"Human"}), 64)
    assert f"8 of 8 prompts have words that {base} has never read: " in capsys.readouterr().err


def test_ppo_draws_every_prompt_once_a_round():
    stream = train_ppo.shuffled("abcd", torch.Generator().manual_seed(0))
    rounds = [[next(stream) for _ in range(4)] for _ in range(3)]
    assert all(sorted(one) == list("abcd") for one in rounds) and len(set(map(tuple, rounds))) > 1


@pytest.mark.parametrize("more", [dict(batch=9), dict(micro_batch=3), dict(updates=0),
                                  dict(benign_share=1.5)])
def test_ppo_refuses_settings_that_cannot_work(more):
    with pytest.raises(UserError):
        train_ppo.check(train_ppo.Config(**{"batch": 8, "micro_batch": 4, **more}))


# --- all three --------------------------------------------------------------------------------------------

def test_same_seed_same_bits(base, revisions, pairs, prompts, tmp_path):
    pm = planted_pm(tmp_path / "start", base)
    for name in "ab":
        train_sft.main(sft(base, revisions, tmp_path / f"sft-{name}"))
        train_pm.main(train_pm.Config(init=base, pairs=(pairs,), out=str(tmp_path / f"pm-{name}"), epochs=1, freeze=0,
                                      **QUIET))
        train_ppo.main(ppo(base, pm, prompts, tmp_path / f"ppo-{name}", critic_warmup=0))
    for stage in ("sft", "pm", "ppo"):
        assert weights(tmp_path / f"{stage}-a") == weights(tmp_path / f"{stage}-b")
    train_sft.main(sft(base, revisions, tmp_path / "sft-c", seed=1))
    assert weights(tmp_path / "sft-c") != weights(tmp_path / "sft-a")


def test_done_work_is_skipped_and_other_settings_are_an_error(base, revisions, tmp_path, capsys):
    out = tmp_path / "sft"
    train_sft.main(sft(base, revisions, out))
    before = weights(out)
    assert train_sft.main(sft(base, revisions, out)) == {"skipped": True}
    assert "already" in capsys.readouterr().out
    with pytest.raises(UserError, match="--lr"):
        train_sft.main(sft(base, revisions, out, lr=0.1))
    assert weights(out) == before
    train_sft.main(sft(base, revisions, out, lr=0.1, again=True))
    assert weights(out) != before and json.loads((out / "run.json").read_text())["config"]["lr"] == 0.1


@pytest.mark.parametrize("module", [train_sft, train_pm, train_ppo])
def test_flags_are_read_and_misspelt_ones_refused(module):
    with pytest.raises(SystemExit) as stop:
        cli.parse(module.Config, ["--learning-rte", "1"])
    assert stop.value.code == 2
    source = Path(module.__file__).read_text()
    assert [name for name in module.Config.__dataclass_fields__ if f"cfg.{name}" not in source] == []


def test_an_error_is_one_line(tmp_path):
    ran = subprocess.run([sys.executable, "train_sft.py", "--base", str(tmp_path / "nothing"),
                          "--out", str(tmp_path / "out")], capture_output=True, text=True, cwd=ROOT)
    assert ran.returncode == 2
    assert ran.stderr.startswith("mincai: error:") and len(ran.stderr.splitlines()) == 1


# --- compiled ---------------------------------------------------------------------------------------------

@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler on a CPU")
def test_compiled_networks_learn_the_same(base, revisions, pairs, prompts, tmp_path):
    """python -m pytest -m slow tests/test_train.py: some minutes, nearly all of them the compiler's."""
    pm = tmp_path / "pm"
    checkpoint.save(ScalarModel(checkpoint.load(base), likelihood=0.1), pm, load_tokenizer(base).files())

    def curves(name, compiled):
        out, more = tmp_path / f"{name}-{compiled}", dict(compile=compiled)
        scored = train_pm.Config(init=base, pairs=(pairs,), out=str(out), epochs=1, **more, **QUIET)
        {"sft": lambda: train_sft.main(sft(base, revisions, out, **more)), "pm": lambda: train_pm.main(scored),
         "ppo": lambda: train_ppo.main(ppo(base, str(pm), prompts, out, freeze=1, critic_warmup=0, **more))}[name]()
        return [{k: v for k, v in row.items() if k not in ("episodes_per_s", "tokens_per_s", "sampling_gap")}
                for row in rows_of(out / "metrics.jsonl")]
    for name in ("sft", "pm", "ppo"):
        for eager, compiled in zip(curves(name, False), curves(name, True), strict=True):
            assert compiled == pytest.approx(eager, rel=1e-3, abs=1e-5), name


@pytest.mark.parametrize("stage", ["sft", "pm", "ppo"])
def test_a_place_that_cannot_be_written_is_told_before_training(stage, base, revisions, pairs, prompts, tmp_path,
                                                                monkeypatch):
    """Not after it, when hours would be lost."""
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("x")
    (tmp_path / "file").write_text("x")
    planted_pm(tmp_path / "start", base)

    def never(*_, **__):
        raise AssertionError("it trained")
    monkeypatch.setattr(torch.optim.Optimizer, "zero_grad", never)
    for out in (tmp_path / "mine", tmp_path / "file", tmp_path / "file" / "under"):
        main, cfg = {"sft": (train_sft.main, lambda: sft(base, revisions, out)),
                     "pm": (train_pm.main, lambda: train_pm.Config(init=base, pairs=(pairs,), out=str(out), **QUIET)),
                     "ppo": (train_ppo.main, lambda: ppo(base, str(tmp_path / "start"), prompts, out))}[stage]
        with pytest.raises(UserError, match="no checkpoint|does not record any settings|cannot be written"):
            main(cfg())
    assert sorted(p.name for p in (tmp_path / "mine").iterdir()) == ["thesis.txt"]


def test_snapshots_of_a_stopped_run_do_not_join_the_next(base, prompts, tmp_path):
    planted_pm(tmp_path / "start", base)
    left = tmp_path / "ppo.partial" / "snapshots" / "u099"
    checkpoint.save(checkpoint.load(base), left)
    train_ppo.main(ppo(base, str(tmp_path / "start"), prompts, tmp_path / "ppo", updates=2, snapshots=1))
    assert sorted(p.name for p in (tmp_path / "ppo" / "snapshots").iterdir()) == ["u001", "u002"]
    assert not left.exists()


def test_another_vocabulary_is_told(base, pairs, prompts, tmp_path):
    planted_pm(tmp_path / "start", base)
    short = GPT(GPTConfig(vocab_size=200, block_size=64, n_layer=1, n_head=2, n_embd=32))
    checkpoint.save(short, tmp_path / "short", load_tokenizer(base).files())
    with pytest.raises(UserError, match="the vocabulary has 257 tokens, the embedding only 200 rows"):
        train_pm.main(train_pm.Config(init=str(tmp_path / "short"), pairs=(pairs,), out=str(tmp_path / "pm"), **QUIET))
    lines = (tmp_path / "start" / "tokenizer.tiktoken").read_bytes().splitlines(keepends=True)
    swapped = [base64.b64encode(b"b") + b" 97\n" if n == 97 else base64.b64encode(b"a") + b" 98\n" if n == 98 else line
               for n, line in enumerate(lines)]
    (tmp_path / "start" / "tokenizer.tiktoken").write_bytes(b"".join(swapped))
    with pytest.raises(UserError, match="another vocabulary"):
        train_ppo.main(ppo(base, str(tmp_path / "start"), prompts, tmp_path / "ppo"))


def test_a_preference_model_that_is_no_better_than_length_says_so(base, pairs, tmp_path, capsys):
    rows = data.read_jsonl(pairs)[:40]
    data.write_jsonl(pairs, [row | {"a_ids": [97, EOT], "b_ids": [98, 98, EOT], "p_a": 1.0} for row in rows])
    train_pm.main(train_pm.Config(init=base, pairs=(pairs,), out=str(tmp_path / "pm"), epochs=0, **QUIET))
    assert "always the shorter 1.000" in (told := capsys.readouterr().out) and "NO better than choosing by length" in told


@pytest.mark.parametrize("change, told", [
    ({"revision": 3}, "line 2: revision is a int; write text"), ({"prompt": None}, "line 2: this row lacks prompt"),
    ({"revision": " "}, "line 2: the revision is empty"),
    ({"revision_ids": [5, 999]}, "line 2: revision_ids is no list of token ids below 257")])
def test_a_revision_that_is_none_is_told(base, revisions, tmp_path, change, told):
    rows = data.read_jsonl(revisions)
    data.write_jsonl(revisions, [rows[0], rows[1] | change, *rows[2:]])
    with pytest.raises(UserError, match=told):
        train_sft.main(sft(base, revisions, tmp_path / "sft"))
