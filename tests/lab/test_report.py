"""The report of a run written by hand: one file that stands alone, in order, with the files'
numbers, all escaped."""

import html
import re
import runpy
import shlex
import sys
from html.parser import HTMLParser

import pytest

from mincai import UserError, constitution
from mincai.lab import evaluate, report, table
from mincai.lab.table import Table, rate
from mincai.plumbing import cli, data

EVIL = '<script src=x>alert("1")</script>'
STAGES = ("base", "sft", "ppo")
PRINCIPLE = next(p for p in constitution.load_constitution() if p.target == "reasons")


class Reader(HTMLParser):
    """Collects tags, ids, links, and what would be fetched; `open` is empty at the end of a sound
    page."""

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.ids, self.links, self.fetched, self.headings = (
            [],
            [],
            [],
            [],
            [],
            [],
        )
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        found = dict(attrs)
        self.tags.append(tag)
        self.ids += [found["id"]] if "id" in found else []
        self.headings += [(tag, "id" in found)] if tag == "h2" else []
        self.fetched += [
            v for k, v in attrs if k in ("src", "srcset", "data", "poster", "xlink:href", "action")
        ]
        (self.links if tag == "a" else self.fetched).extend(
            [found["href"]] if "href" in found else []
        )
        if tag == "svg":
            assert found.get("aria-label") and found.get("role") == "img"
        if tag != "meta":
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open and self.open.pop() == tag, f"</{tag}> closes another"


def plain(markup):
    return re.sub(r"\s+", " ", re.sub("<[^>]+>", " ", markup))


def part(text, anchor):
    return text[text.index(f'<h2 id="{anchor}"') :].split("</section>")[0]


def answer(stage, number, kind):
    return {
        "stage": stage,
        "id": f"eval-{number}",
        "prompt": f"request {number} {EVIL}",
        "kind": kind,
        "category": "theft" if kind == "harmful" else "",
        "attack": "plain",
        "answer": f"{stage} says {EVIL}",
        "split": "eval" if kind == "harmful" else "eval-twin",
        "complied": stage == "base",
        "refused": stage != "base",
        "evasive": stage == "sft",
        "true_reason": stage == "ppo",
        "true_offer": False,
        "right": stage == "base",
    }


def summary(k):
    """A stage's summary in which k of 20 is every rate; one family has a single request."""
    parts = {
        "attack_by_family": {"plain": rate([True]), "urgency": rate(i < k for i in range(20))},
        "attack_by_category": {"theft": rate(i < k for i in range(20))},
        "helpful_by_family": {"plain": rate([])},
    }
    return {
        key: parts.get(key, rate(i < k for i in range(20))) for key in (*table.ROWS, *parts)
    } | {"quality": 0.123, "compliance": {"logp_per_token": -1.5, "probability": 0.0625}}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A run folder with every file but those of --deep, --controls and --claims."""
    out = tmp_path_factory.mktemp("report") / "run"
    rounds = [
        {
            "round": 1,
            "principle": "theft-1",
            "critique": "it keeps it",
            "revision": "keep it",
            "outcome": "keep",
        },
        {
            "round": 2,
            "principle": PRINCIPLE.id,
            "critique": f"a critique {EVIL}",
            "revision": f"revised {EVIL}",
            "outcome": "revised",
        },
    ]
    data.write_jsonl(
        out / "revisions.jsonl",
        [
            {
                "id": f"loop-{i}",
                "prompt": f"prompt {i} {EVIL}",
                "setting": None,
                "kind": kind,
                "category": "theft",
                "attack": "plain",
                "original": f"original {EVIL}",
                "revision": "x",
                "changed": True,
                "rounds": rounds,
            }
            for i, kind in enumerate(("benign", "harmful"))
        ],
    )
    data.write_jsonl(
        out / "comparisons.jsonl",
        [
            {
                "prompt_id": "loop-1",
                "a": f"side a {EVIL}",
                "b": f"side b {EVIL}",
                "principle": PRINCIPLE.id,
                "p_a": 0.125,
                "p_ab": 0.25,
                "p_ba": 1.0,
                "reasons": f"because {EVIL}",
            }
        ],
    )
    stamp = {
        "mincai": "1",
        "seed": 7,
        "git": "0123456789abcdef",
        "torch": "2.x",
        "device": "cpu",
        "config": {},
    }
    for stage, metrics in (
        ("sft", {"val_before": 2.0, "val_after": 0.5, "rows": 10, "seconds": 12.3}),
        ("pm", {"val_accuracy": 0.9, "held": 10, "pairs": 90}),
        ("ppo", {"score_before": -0.1, "score_after": 1.4, "kl_after": 1.5}),
    ):
        data.write_json(out / stage / "run.json", {**stamp, "metrics": metrics})
    data.write_jsonl(
        out / "ppo" / "metrics.jsonl",
        [
            {"update": 0, "dev_quality": 0.1, "dev_attacks": 0.5},
            *(
                {
                    "update": i,
                    "score": i / 4,
                    "kl_exact": i / 5,
                    "entropy": 0.2,
                    "explained": float("nan"),
                }
                for i in (1, 2, 3)
            ),
            {
                "update": 4,
                "score": 1.0,
                "kl_exact": 0.8,
                "entropy": 0.2,
                "dev_quality": 0.8,
                "dev_attacks": 0.25,
            },
        ],
    )
    data.write_jsonl(
        out / "eval_samples.jsonl",
        [
            answer(stage, i, kind)
            for stage in STAGES
            for i, kind in enumerate(("harmful", "benign"))
        ],
    )
    stages = {stage: summary(k) for stage, k in zip(STAGES, (20, 5, 2))}
    data.write_json(
        out / "eval.json",
        {
            **stamp,
            "seconds": 60,
            "stages": stages,
            "greedy": {stage: summary(11) for stage in STAGES},
            "headline": {
                f"{s}_{key}": value
                for s in STAGES[1:]
                for key, value in (
                    ("removed_attack_success", 0.75),
                    ("removed_attack_success_seen", 0.8125),
                    ("help_kept", 1.25),
                )
            },
            "judge_held": {
                "accuracy": rate([True] * 9 + [False]),
                "calibration_error": 0.0625,
                "same_slot": 0.125,
                "by_about": {"truth": rate([True] * 10)},
            },
            "critic_held": {"applies": rate([True] * 10), "does_not_apply": rate([False] * 10)},
        },
    )
    return out


@pytest.fixture(scope="module")
def text(folder):
    return report.main(report.Config(out=str(folder))).read_text(encoding="utf-8")


def test_the_page_is_one_file_that_fetches_nothing(text):
    found = Reader(text)
    assert found.open == found.fetched == []
    assert (
        [link[1:] for link in found.links] == found.ids == [anchor for anchor, *_ in report.PARTS]
    )
    assert found.headings == [("h2", True)] * len(report.PARTS)
    assert not {"script", "link", "iframe", "object", "embed", "img"} & set(found.tags)
    assert not re.search(r"https?://|@import|url\(", text)


def test_what_models_and_people_wrote_is_escaped(text):
    assert "<script" not in text
    escaped = "&lt;script src=x&gt;alert(&quot;1&quot;)&lt;/script&gt;"
    assert text.count(escaped) == 7 + 2 * 4, (
        "in the trail, and in two held-out requests with three answers each"
    )


def test_a_request_goes_all_the_way(text):
    words = plain(part(text, "trail"))
    order = [
        "prompt 1",
        "original",
        PRINCIPLE.tiny,
        "a critique",
        "revised",
        "The other rounds",
        "it keeps it",
        "side a",
        "side b",
        "because",
        "P(A is better) = 0.250 with A in the first place, 0.000 with A in the second. The label: 0.125.",
        "request 0",
        "base says",
        "complies, or is garbled",
        "phase 1",
        "refuses evasively",
        "ppo says",
        "refuses with the true reason",
        "request 1",
        "helps, whole and right",
        "refuses needlessly",
    ]
    places = [words.index(some) for some in order]
    assert places == sorted(places), list(zip(order, places))
    assert "harmful, theft, plain" in words and "prompt 0" not in words
    assert re.findall(r'class="won"><b>(.)</b>', text) == ["B"]


def test_of_an_even_pair_neither_is_the_choice(folder, tmp_path):
    for name in ("revisions.jsonl", "comparisons.jsonl"):
        rows = data.read_jsonl(folder / name)
        even = [{**row, "p_a": 0.5, "p_ba": 0.25} if "p_a" in row else row for row in rows]
        data.write_jsonl(tmp_path / name, even)
    trail = part(report.build(report.Config(out=str(tmp_path))), "trail")
    assert "side b" in trail and 'class="won"' not in trail


def test_another_request_can_be_followed(folder):
    assert "prompt 0" in report.build(report.Config(out=str(folder), trail="loop-0"))
    with pytest.raises(UserError, match="--trail loop-9"):
        report.build(report.Config(out=str(folder), trail="loop-9"))


def test_the_loop_has_the_runs_numbers(text):
    words = plain(part(text, "loop"))
    for some in (
        "prompts 2 1 harmful,",
        "critiques, revisions 4 2 revised,",
        "fine-tuning 2.00 → 0.50",
        "comparisons 1 100% decided,",
        "preference model 90.0%",
        "PPO -0.10 → +1.40",
        "KL 1.50 nats",
    ):
        assert some in words, some


def test_results_are_the_files(text):
    markup = part(text, "results")
    words = plain(markup)
    assert (
        "attack success, all families 20 100.0% 83.9–100.0 25.0% 11.2–46.9 10.0% 2.8–30.1" in words
    )  # Wilson's
    assert (
        "half the helped 12.3% 12.3% 12.3%" in words
        and "probability of complying 0.0625 0.0625" in words
        and "After PPO 75.0% of the base&#x27;s harmful answers" in words
    )
    assert "81.2% on families seen in training; its help is 125.0% of what it was" in words
    greedy = words[words.index("Likeliest answers") :]
    assert greedy.index("55.0%") < greedy.index("Attack success by family")
    assert "plain 1 1 of 1 1 of 1 1 of 1 urgency 20 100.0%" in words, "one request is no percentage"
    assert "judge, held-out principles 10 90.0% 59.6–98.2 0.062 12.5% truth 10 100.0%" in words
    assert "critic, held-out principles applies 10 100.0%" in words
    assert markup.count("<details>") == 4


def test_ppos_curves(text):
    markup = part(text, "ppo")
    labels = re.findall(r'aria-label="([^"]*)"', markup)
    assert labels == [
        "score, in deviations: 0.250 at first, 1.00 at update 4",
        "KL, nats an answer: 0.200 at first, 0.800 at update 4",
        "attacks that succeed, development: 0.500 at first, 0.250 at update 4",
        "quality, development: 0.100 at first, 0.800 at update 4",
    ]
    assert "entropy , nats a token: between 0.200 and 0.200 over 4 updates" in plain(markup)
    assert "explained variance" not in markup, "a critic without a finite number is left out"


def test_how_it_was_made(text):
    words = plain(part(text, "made"))
    assert (
        "sft/run.json 7 2.x 0123456789 cpu 12" in words
        and "eval.json 7 2.x 0123456789 cpu 60" in words
    )


def test_more_measurements_are_printed_by_their_own_modules(folder, tmp_path, monkeypatch):
    said = {"deep": "eval_deep.json", "controls": "controls.json", "claims": "claims.json"}
    parts = [
        (
            a,
            title,
            report.section(said[a], lambda found: [Table(found["x"], [], [])])
            if a in said
            else make,
            files,
        )
        for a, title, make, files in report.PARTS
    ]
    monkeypatch.setattr(report, "PARTS", parts)
    for name in said.values():
        data.write_json(tmp_path / name, {"x": f"{name} < 1"})
    text = report.build(report.Config(out=str(tmp_path)))
    for anchor, name in said.items():
        assert f"<caption>{name} &lt; 1</caption>" in part(text, anchor)


def test_an_empty_run_says_what_to_run(tmp_path):
    (out := tmp_path / "a run").mkdir()
    text = report.build(report.Config(out=str(out)))
    assert Reader(text).open == [] and "not yet" in part(text, "loop")
    quoted = f"'{out}'"  # its name has a space
    commands = {html.unescape(command) for command in re.findall("<code>(.*?)</code>", text)}
    shown = {f"python -m mincai.lab.evaluate {quoted} {flag}" for flag in report.MORE.values()}
    assert commands == shown
    for command in commands:
        *_, name, flag = shlex.split(command)
        assert cli.parse(evaluate.Config, [name, flag]).out == str(out)
    for name in (
        "revisions.jsonl",
        "sft/run.json",
        "comparisons.jsonl",
        "pm/run.json",
        "eval.json",
    ):
        assert f"No {name} yet; the command that began this run goes on with it" in text


@pytest.mark.parametrize(
    "name, content, words",
    [
        ("eval.json", "{", "eval.json: cannot be read as a JSON object"),
        ("eval.json", "[1]", "cannot be read as a JSON"),
        (
            "eval.json",
            '{"config": {}}',
            r"eval.json is not as this version writes it \(KeyError\('stages'\)\)",
        ),
        ("eval.json", '{"stages": 3}', "eval.json is not as"),
        ("pm/run.json", '{"metrics": {"held": 1}}', "run.json is not as"),
        ("controls.json", "{}", "controls.json is not as"),
        ("comparisons.jsonl", '{"a": 1}', "this row lacks prompt_id"),
        ("ppo/metrics.jsonl", "x", "not JSON"),
        ("eval_samples.jsonl", "", "holds no rows"),
    ],
)
def test_a_broken_file_is_one_line(tmp_path, name, content, words):
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=words) as error:
        report.build(report.Config(out=str(tmp_path)))
    assert "\n" not in str(error.value)


def test_what_is_not_ours_is_not_replaced(tmp_path, folder):
    with pytest.raises(UserError, match="no such run folder"):
        report.main(report.Config(out=str(tmp_path / "nowhere")))
    (tmp_path / "report.html").write_text("a person's")
    (tmp_path / "loop.svg").write_text("<svg/>")
    for cfg in (
        report.Config(out=str(tmp_path)),
        report.Config(out=str(folder), picture=str(tmp_path / "loop.svg")),
    ):
        with pytest.raises(UserError, match="nothing says that mincai wrote it"):
            report.main(cfg)
    assert (tmp_path / "report.html").read_text() == "a person's"
    (tmp_path / "report.html").unlink()
    assert report.main(report.Config(out=str(tmp_path))) == report.main(
        report.Config(out=str(tmp_path))
    ), "again"


def test_the_picture_has_the_numbers_and_the_curve(folder, tmp_path):
    path = report.main(report.Config(out=str(folder), picture=str(tmp_path / "loop.svg")))
    text = path.read_text(encoding="utf-8")
    assert (
        text == report.picture(folder)
        and "<polyline" in text
        and not (tmp_path / "report.html").exists()
    )
    for some in ("2.00 → 0.50", "90.0%", "-0.10 → +1.40", "KL 1.50 nats an answer"):
        assert some in text
    report.main(report.Config(out=str(folder), picture=str(path)))  # its own work may be replaced


def test_an_english_run_is_printed_as_assess_prints_it(tmp_path):
    side = {
        "refuses": rate([True, False]),
        "by_attack": {},
        "by_category": {},
        "unseen_category": rate([]),
    }
    data.write_json(tmp_path / "eval.json", {"stages": {"base": {"harmful": side, "benign": side}}})
    text = report.build(report.Config(out=str(tmp_path)))
    results = part(text, "results")
    assert "harmful: refuses, by its phrases" in results
    assert "1 of 2" in results and "50.0%" not in results  # two answers are no percentage
    # what the oracle's run alone can have is not asked for
    assert Reader(text).ids == ["trail", "loop", "results", "ppo", "made"]
    assert not re.search("--(deep|controls|claims)", text)


def test_the_way_to_ppos_answer_stands_open(text):
    """Each step is a heading with its caption, and beside it what was said."""
    steps = re.findall(r"<li><div><h3>(.*?)</h3><p class=.caption.>(.*?)</p></div><div>", text)
    assert [tuple(map(html.unescape, step)) for step in steps] == [*report.CAPTIONS.items()]
    trail = part(text, "trail")
    assert trail.index("PPO</b>") < trail.index(html.escape("A held-out ordinary request"))
    shown = re.sub("<details>.*?</details>", "", trail)
    assert "ppo says" in shown and "a critique" in shown and "it keeps it" not in shown


def test_a_rates_axis_spans_all_rates(text):
    """From 0 to 1: of 64 development requests a few more or fewer are no event."""
    dev = re.search(r"<figure><figcaption><b>attacks that succeed.*?</figure>", text)[0]
    assert re.findall(r'text-anchor="end">([^<]*)', dev) == ["0", "0.5", "1"]
    score = re.search(r"<figure><figcaption><b>score.*?</figure>", text)[0]
    assert re.findall(r'text-anchor="end">([^<]*)', score) == ["0.2", "0.4", "0.6", "0.8", "1"]


def test_the_command_takes_the_folder_as_it_is(folder, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["report", str(folder)])
    runpy.run_path(report.__file__, run_name="__main__")
    assert capsys.readouterr().out == f"report: {folder / 'report.html'}\n"
