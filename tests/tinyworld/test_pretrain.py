"""Pretraining packs whole documents, measures what it says, and keeps held-out prompts apart."""

import dataclasses
import json
from collections import Counter
from itertools import count, cycle
from pathlib import Path

import pytest
import torch

from mincai import UserError, constitution, shipped
from mincai.model import GPT, GPTConfig
from mincai.plumbing import checkpoint, cli, output
from mincai.plumbing.tokenizer import from_ranks, load_tokenizer, words_of
from mincai.tinyworld import attacks, corpus, pretrain, world

BYTES = from_ranks({bytes([b]): b for b in range(256)})  # one token a byte, 256 ends a document
ACTIONS, PRINCIPLES = world.build(), constitution.load_constitution()


# --- packing ---


def test_documents_are_packed_whole_by_the_first_row_with_room():
    a, b = [("ab", 0.0), ("c", 5.0)], [("defgh", 0.5)]
    documents = cycle([a, b])
    ids, targets, positions, weights, segments = pretrain.pack(documents, BYTES, length=9, rows=2)
    # each row has room for a (3 inputs) and b (5), and for nothing in its last column
    row = [ord(x) for x in "abc"] + [ord(x) for x in "defgh"] + [0]
    assert ids.tolist() == [row, row]
    assert targets[0].tolist() == [ord("b"), ord("c"), 256, *(ord(x) for x in "efgh"), 256, 0]
    assert positions[0].tolist() == [0, 1, 2, 0, 1, 2, 3, 4, 0]
    # a weight belongs to the token to be predicted; a document's end weighs as own words do
    assert weights[0].tolist() == [0.0, 5.0, 0.5, 0.5, 0.5, 0.5, 0.5, 0.5, 0.0]
    assert segments.tolist() == [[1, 1, 1, 2, 2, 2, 2, 2, 0], [3, 3, 3, 4, 4, 4, 4, 4, 0]]


def test_a_document_that_finds_no_room_is_passed_over():
    """A shorter one may still fit; after four that do not, the batch is given."""
    long, short, read = [("x" * 9, 1.0)], [("y", 1.0)], count()
    stream = iter([[("a" * 5, 1.0)], long, long, long, short, long, long])
    documents = (document for document, _ in zip(stream, read))
    ids, *_, segments = pretrain.pack(documents, BYTES, length=8, rows=1)
    assert ids[0].tolist() == [97] * 5 + [121, 0, 0] and next(read) == 6  # documents read
    assert segments[0].tolist() == [1] * 5 + [2, 0, 0]


def test_rows_too_short_for_any_document_are_named():
    with pytest.raises(UserError, match="4 tokens; raise --block-size"):
        pretrain.pack(cycle([[("a" * 9, 1.0)]]), BYTES, length=4, rows=2)


def test_a_packed_document_is_read_as_if_it_were_alone():
    torch.manual_seed(0)
    model = GPT(GPTConfig(vocab_size=257, block_size=32, n_layer=2, n_head=2, n_embd=32))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    documents = cycle([[("first", 1.0)], [("second one", 1.0)]])
    ids, _, positions, _, segments = pretrain.pack(documents, BYTES, length=24, rows=1)
    packed = model(ids, positions, pretrain.segment_mask(segments))
    for number in (1, 2):
        mine = segments[0] == number
        alone = model(ids[:, mine])
        torch.testing.assert_close(packed[:, mine], alone)


# --- what it can do ---


@pytest.fixture
def pretend(monkeypatch):
    """pretend(change, facts=1.0): the capability of a model that writes change(n, text) where the
    n-th document of its kind goes on with `text`, and knows this share of the facts."""

    def start(change, facts=1.0):
        written, numbers = [], {"dialogue": count(), "review": count(), "comparison": count()}
        for kind in numbers:
            real = getattr(corpus, kind)

            def write(*args, kind=kind, real=real):
                document = real(*args)
                text = "".join(piece for piece, _ in document[1:])
                written.append((document[0][0], change(next(numbers[kind]), text)))
                return document

            monkeypatch.setattr(corpus, kind, write)

        def generate_batched(model, prompts, **settings):
            assert settings["temperature"] == 0.0
            found, answers = list(zip(prompts, written)), []
            for prompt, (head, text) in found:
                assert BYTES.decode(prompt) == head
                answers.append(BYTES.encode(text))
            written.clear()
            return answers

        def next_logp(model, prompts, words):
            truth = {f"may we {a.text} ? that is": a.wrong for a in ACTIONS}
            right = [n < facts * len(prompts) for n in range(len(prompts))]
            wrong = [truth[BYTES.decode(p)] == r for p, r in zip(prompts, right)]
            return torch.tensor([[0.0, -1.0] if w else [-1.0, 0.0] for w in wrong])

        monkeypatch.setattr(pretrain, "generate_batched", generate_batched)
        monkeypatch.setattr(pretrain, "next_logp", next_logp)
        return pretrain.capability(None, BYTES, ACTIONS, PRINCIPLES, seed=1)

    return start


def test_a_model_that_writes_what_it_should_can_do_all(pretend):
    assert set(pretend(lambda n, text: text).values()) == {1.0}


def test_a_model_that_writes_nothing_can_do_nothing(pretend):
    assert set(pretend(lambda n, text: "", facts=0.0).values()) == {0.0}


def test_each_capability_is_the_share_that_is_right(pretend):
    """Every fourth text is spoilt in one place, and every other fact."""

    def change(n, text):
        if n % 4:
            return text
        return (
            text.replace("take the", "take a")
            .replace("keeps the", "breaks the")
            .replace("(A)", "(B)")
        )

    found = pretend(change, facts=0.5)
    assert found["fact"] == 0.5 and found["comply"] == 0.75 and found["judge"] == 0.75
    assert 0.75 <= found["verdict"] < 0.95 and found["critique"] <= found["verdict"]
    assert 0.75 <= found["prefers"] < 0.95


def test_help_with_harm_that_is_let_pass_is_counted_apart(pretend):
    found = pretend(lambda n, text: text.replace("it breaks", "it keeps"))
    assert found["breaks"] == 0.0 and 0.4 < found["verdict"] < 0.8 and found["judge"] == 1.0


def test_half_of_the_help_counts_as_help_and_a_wrong_way_does_not(pretend):
    terse = pretend(lambda n, text: text.split(" then go")[0].replace("first take", "take"))
    assert terse["comply"] == 1.0


def test_what_is_left_to_chance_does_not_count(pretend):
    """A revision's style and a tie's letter are drawn: only the line above them is held against."""
    found = pretend(lambda n, text: text.split("\n")[0] + "\nelse")
    assert set(found.values()) == {1.0}


# --- the prompts beside it ---


@pytest.fixture(scope="module")
def files():
    return pretrain.side_files(ACTIONS, seed=0)


def test_prompt_sets_share_no_action(files):
    splits = {a.text: a.split for a in ACTIONS}
    found = {}
    for file, rows in files.items():
        for row in rows:
            found.setdefault((file, row["split"]), set()).add(splits[row["action"]])
    held = ("eval", "eval-twin", "setting", "setting-harmful")
    wanted = {
        ("prompts", "loop"): {"loop", "demo"},
        ("prompts", "excused"): {"loop"},
        ("prompts_eval", "unseen-category"): {"unseen"},
        **{("prompts_eval", split): {"eval"} for split in held},
        **{("prompts_dev", split): {"dev"} for split in held},
    }
    assert found == wanted


def test_the_loop_has_no_harmful_request_of_a_demonstration(files):
    by_text = {a.text: a for a in ACTIONS}
    for row in files["prompts"]:
        action = by_text[row["action"]]
        assert row["attack"] in attacks.SEEN
        assert (row["kind"] == "harmful") == action.harmful(row.get("setting"))
        assert action.split == "loop" or row["kind"] == "benign"
        assert row["category"] == (action.reason if row["kind"] == "harmful" else "")


def test_prompt_sets_have_the_sizes_they_should(files):
    """88 wrong and 96 fine actions of the loop, 120 fine ones of demonstrations, under 8 families,
    once plain and once under another setting; apart from them 22 of the loop's under the setting
    that excuses them."""
    count = Counter((row["split"], row["kind"], "setting" in row) for row in files["prompts"])
    assert count == {
        ("loop", "harmful", False): 88 * 8,
        ("loop", "harmful", True): 88 * 8,
        ("loop", "benign", False): (96 + 120) * 8,
        ("loop", "benign", True): (96 + 120) * 8,
        ("excused", "benign", True): 22 * 8,
    }
    for file, sizes in {
        "prompts_eval": (77 * 9, 84 * 8, 22 * 3, 77 * 3, 27 * 4),
        "prompts_dev": (22 * 10, 24 * 10, 11 * 3, 22 * 3, 0),
    }.items():
        splits = ("eval", "eval-twin", "setting", "setting-harmful", "unseen-category")
        count = Counter(row["split"] for row in files[file])
        assert tuple(count[split] for split in splits) == sizes
        kinds = {row["split"]: row["kind"] for row in files[file]}
        assert all(
            (kind == "benign") == (split in ("eval-twin", "setting"))
            for split, kind in kinds.items()
        )
        assert {r["attack"] for r in files[file] if r["split"] == "eval"} == set(attacks.FAMILIES)
        assert len({row["id"] for row in files[file]}) == len(files[file])


# --- what it writes ---


def test_the_shipped_base_is_as_its_stamp_says(files):
    folder = Path(shipped("tiny"))
    stamp = json.loads((folder / "run.json").read_text())
    assert {name: output.sha256(folder / name) for name in stamp["sha256"]} == stamp["sha256"]
    for name, rows in files.items():
        assert (folder / f"{name}.jsonl").read_text() == "".join(json.dumps(r) + "\n" for r in rows)


def test_a_base_lists_the_words_it_has_read(tiny_base):
    words = (tiny_base / "words.txt").read_text().split()
    assert words == sorted(set(words)) and {"lamp", "quilt", ",", "Review", "weather"} <= set(words)
    assert load_tokenizer(tiny_base).words == set(words)
    prompts = [
        json.loads(line)["prompt"]
        for name in ("prompts", "prompts_eval", "prompts_dev")
        for line in (tiny_base / f"{name}.jsonl").read_text().splitlines()
    ]
    assert set(words) >= {word for prompt in prompts for word in words_of(prompt)}
    taught = [p.tiny for p in PRINCIPLES if p.split == "train" and p.about != world.UNSEEN]
    assert set(words) >= {word for tiny in taught for word in words_of(tiny)}


@pytest.fixture
def quick(tiny_base, monkeypatch):
    """Settings of a pretraining of a second: with tiny_base's vocabulary, and no look at what it
    can do."""
    monkeypatch.setattr(pretrain, "train_bpe", lambda texts, n: load_tokenizer(tiny_base).ranks)
    monkeypatch.setattr(pretrain, "capability", lambda *_, **__: {})
    return dict(
        tokens=4 * 2 * 256, batch_size=2, n_layer=1, n_head=2, n_embd=32, device="cpu", threads=1
    )


def test_the_seed_makes_the_base(tiny_base, quick, tmp_path):
    """Its weights, that is; the prompts beside it are made by the world's seed."""
    name, want = "h.0.attn.c_attn.weight", checkpoint.load(tiny_base).state_dict()
    for seed in (0, 1):
        out = tmp_path / str(seed)
        pretrain.main(pretrain.Config(out=str(out), seed=seed, **quick))
        assert torch.equal(checkpoint.load(out).state_dict()[name], want[name]) == (seed == 0)
        for file in ("prompts.jsonl", "prompts_dev.jsonl", "prompts_eval.jsonl"):
            assert (out / file).read_bytes() == (tiny_base / file).read_bytes()


@pytest.mark.parametrize("flags, every", [((), True), (("--no-prose",), False)])
def test_a_base_without_prose_reads_it_on_demonstrated_actions_alone(
    flags, every, quick, tmp_path, monkeypatch
):
    """The flag itself, as a person types it."""
    asked, real = [], corpus.documents

    def documents(actions, principles, rng, prose_on=None):
        asked.append(prose_on)
        return real(actions, principles, rng, prose_on)

    monkeypatch.setattr(corpus, "documents", documents)
    cfg = cli.parse(pretrain.Config, [*flags, "--out", str(tmp_path / "base")])
    pretrain.main(dataclasses.replace(cfg, **quick))
    [read] = asked
    if every:
        assert read is None
    else:
        assert {action.split for action in read} == {"demo"} and len(read) > 100


def test_fewer_tokens_than_one_step_reads_are_one_step(quick, tmp_path):
    """Else the schedule would divide by no steps."""
    pretrain.main(pretrain.Config(out=str(tmp_path / "one"), **quick | {"tokens": 1}))
    [row] = (tmp_path / "one" / "metrics.jsonl").read_text().splitlines()
    assert json.loads(row)["step"] == 1


def test_a_base_that_was_stopped_on_the_way_is_made_again(quick, tmp_path, monkeypatch):
    cfg, real, saved = (
        pretrain.Config(out=str(tmp_path / "b"), check_every=2, **quick),
        checkpoint.save,
        [],
    )

    def save(*args):
        real(*args)
        saved.append(1)
        if len(saved) == 1:
            raise KeyboardInterrupt

    monkeypatch.setattr(checkpoint, "save", save)
    with pytest.raises(KeyboardInterrupt):
        pretrain.main(cfg)
    assert (tmp_path / "b" / "run.json").exists()
    assert pretrain.main(cfg)["step"] == 4 and len(saved) == 3
    assert pretrain.main(cfg) == {}  # is there already


def test_a_base_of_the_first_edition_is_named_and_made_anew_only_when_told(first_edition, quick):
    settings = dict(out=str(first_edition), **quick)
    before = {path.name: path.read_bytes() for path in first_edition.iterdir()}
    with pytest.raises(UserError, match="first edition.*--again"):
        pretrain.main(pretrain.Config(**settings))
    assert {path.name: path.read_bytes() for path in first_edition.iterdir()} == before
    pretrain.main(pretrain.Config(**settings, again=True))
    assert "focus" not in json.loads((first_edition / "run.json").read_text())["config"]


def test_worker_processes_write_documents_of_their_own():
    cfg = pretrain.Config(block_size=1200, batch_size=2)
    packs = pretrain.Packs(cfg, ACTIONS, PRINCIPLES, None, BYTES)
    batches = iter(torch.utils.data.DataLoader(packs, batch_size=None, num_workers=2))
    first, second = next(batches), next(batches)
    assert first[0].shape == second[0].shape == (2, 1200) and not torch.equal(first[0], second[0])
