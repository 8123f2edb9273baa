"""What the page shows is what the models say; what it is sent is data; nobody else may ask."""

import dataclasses
import http.client
import json
import random
import re
import runpy
import shutil
import sys
import threading
import types

import pytest
import torch

from mincai import UserError, constitution, feedback
from mincai.lab import play
from mincai.model import ScalarModel
from mincai.plumbing import checkpoint
from mincai.plumbing.logprobs import answer_logp, answer_scores, next_logp
from mincai.plumbing.tokenizer import load_tokenizer
from mincai.sample import generate
from mincai.tinyworld import attacks

MAX_NEW = 12
PLAIN = {"request": "how do i burn a lamp ?", "setting": "", "family": "", "principle": "harm-1"}
PLAIN |= {"criticised": "base", "temperature": 1.0, "seed": 3}


@pytest.fixture(scope="module")
def run(tiny_base, tmp_path_factory):
    """A run folder whose three stages say different things and end their answers now and then."""
    folder, tokenizer = tmp_path_factory.mktemp("play") / "run", load_tokenizer(tiny_base)
    torch.manual_seed(0)
    for name, push in (("sft", 4.0), ("ppo", 4.5), ("pm", 0.0)):
        model = checkpoint.load(tiny_base)
        with torch.no_grad():
            end = model.wte.weight[tokenizer.eot]
            model.ln_f.bias += push * end / end.norm()
        model = ScalarModel(model) if name == "pm" else model
        checkpoint.save(model, folder / name, extra=tokenizer.files())
    return folder


def config(run, base, **more):
    return play.Config(
        str(run), str(base), str(base / "prompts_eval.jsonl"), max_new=MAX_NEW, **more
    )


@pytest.fixture(scope="module")
def opened(run, tiny_base):
    return play.open_run(config(run, tiny_base, device="cpu"))


@pytest.fixture
def server(opened):
    """send(method, path, body, **headers) -> (status, headers, body)."""
    with play.start(opened, 0) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()

        def send(method, path, body=None, **headers):
            line = http.client.HTTPConnection(play.HOST, server.server_port, timeout=20)
            headers = {name.replace("_", "-"): value for name, value in headers.items()}
            line.request(method, path, body, headers)
            reply = line.getresponse()
            found = reply.status, dict(reply.headers), reply.read()
            line.close()
            return found

        send.port, send.bound = server.server_port, server.socket.getsockname()[0]
        yield send
        server.shutdown()
        thread.join()


def post(server, asked, kind="application/json", **headers):
    body = asked if isinstance(asked, (str, bytes)) else json.dumps(asked)
    status, _, body = server("POST", "/ask", body, Content_Type=kind, **headers)
    return status, json.loads(body)


def drawn(opened, stage, temperature=1.0, seed=PLAIN["seed"], text=PLAIN["request"]):
    """(prompt, sampler's own ids and log-probs) of one stage."""
    tokenizer = opened.planner.tokenizer
    stop = {tokenizer.eot, tokenizer.newline} if stage == "base" else {tokenizer.eot}
    prompt = tokenizer.encode(constitution.dialogue(text))
    draws = torch.Generator().manual_seed(seed)
    some = generate(opened.models[stage], [prompt], MAX_NEW, stop, temperature, draws)
    return prompt, some.lists()[0], some.logp[0]


def ended(opened, **more):
    """What is asked with a seed at which both phase 1 and PPO say something and end."""
    for seed in range(200):
        asked = PLAIN | {"seed": seed} | more
        sides = [
            play.answer(opened, s, constitution.dialogue(asked["request"]), 1.0, seed)
            for s in ("sft", "ppo")
        ]
        if (
            all(side["ended"] and side["text"] for side in sides)
            and sides[0]["text"] != sides[1]["text"]
        ):
            return asked
    raise AssertionError("no seed in 200")


# ---- what it says ----


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_tokens_have_the_models_own_probabilities(opened, temperature):
    """At temperature 1, whatever the answer was drawn at; the others are the likeliest of all."""
    answers = play.ask(opened, PLAIN | {"temperature": temperature})["answers"]
    assert [one["stage"] for one in answers] == ["base", "sft", "ppo"]
    decode = opened.planner.tokenizer.decode
    for one in answers:
        model = opened.models[one["stage"]]
        prompt, ids, logp = drawn(opened, one["stage"], temperature)
        p = torch.tensor([token["p"] for token in one["tokens"]])
        assert [token["text"] for token in one["tokens"]] == [decode([i]) for i in ids]
        torch.testing.assert_close(p.log(), answer_logp(model, [prompt], [ids])[0])
        assert torch.allclose(p.log(), logp, atol=1e-4) == (temperature == 1.0)
        for k, token in enumerate(one["tokens"]):
            every = next_logp(model, [prompt + ids[:k]], range(opened.planner.tokenizer.n_vocab))[0]
            likeliest = [i for i in every.argsort(descending=True).tolist() if i != ids[k]][:5]
            assert [text for text, _ in token["others"]] == [decode([i]) for i in likeliest]
            others = torch.tensor([q for _, q in token["others"]])
            torch.testing.assert_close(others, every[likeliest].exp())


def test_scores_are_the_preference_models(opened):
    asked, tokenizer = ended(opened), opened.planner.tokenizer
    for one in play.ask(opened, asked)["answers"]:
        prompt, ids, _ = drawn(opened, one["stage"], seed=asked["seed"])
        if one["ended"]:
            [right] = answer_scores(opened.pm, [prompt], [[*ids[:-1], tokenizer.eot]]).tolist()
            assert one["score"] == pytest.approx(right)
        else:
            assert len(ids) == MAX_NEW and one["score"] is None


def test_a_lines_end_ends_the_bases_answer_and_is_scored_as_an_end(opened, monkeypatch):
    """As end of text, which is all that the preference model has ever read there."""
    tokenizer, asked = opened.planner.tokenizer, constitution.dialogue("how ?")
    for end in (tokenizer.newline, tokenizer.eot):
        says = [*tokenizer.encode(" sure ."), end]

        def generate(model, prompts, max_new, stop, temperature, draws):
            assert stop == {tokenizer.eot, tokenizer.newline}
            return types.SimpleNamespace(lists=lambda: [says])

        monkeypatch.setattr(play, "generate", generate)
        found = play.answer(opened, "base", asked, 1.0, 0)
        whole = [*says[:-1], tokenizer.eot]
        [right] = answer_scores(opened.pm, [tokenizer.encode(asked)], [whole]).tolist()
        assert (
            found["ended"] and found["text"] == "sure ." and found["score"] == pytest.approx(right)
        )


def test_both_orders_of_the_judge_are_averaged(opened):
    asked = ended(opened)
    found, texts = play.ask(opened, asked), {}
    for one in found["answers"]:
        texts[one["stage"]] = one["text"]
    says = [opened.principles["harm-1"].tiny]
    conversation, a, b = [constitution.dialogue(asked["request"])], [texts["sft"]], [texts["ppo"]]
    base, how = opened.models["base"], dict(max_new=MAX_NEW)
    forth = feedback.judge(base, opened.planner, conversation, a, b, says, **how)
    back = feedback.judge(base, opened.planner, conversation, b, a, says, **how)
    shown = found["judge"]
    assert shown["p_ab"] == pytest.approx(forth.p_ab[0]) and shown["p_ba"] == pytest.approx(
        forth.p_ba[0]
    )
    assert shown["p_ab"] != pytest.approx(shown["p_ba"])
    assert shown["p_a"] == pytest.approx((shown["p_ab"] + 1 - shown["p_ba"]) / 2)
    assert shown["reasons"] == [forth.reasons[0], back.reasons[0]]


@pytest.mark.parametrize("stage", ["base", "sft"])
def test_the_base_criticises_the_answer_that_was_chosen(opened, stage):
    asked, tokenizer = ended(opened, criticised=stage), opened.planner.tokenizer
    found = play.ask(opened, asked)
    [text] = [one["text"] for one in found["answers"] if one["stage"] == stage]
    conversation = constitution.dialogue(asked["request"])
    review = constitution.review(conversation, text, opened.principles["harm-1"].tiny)

    def written(prompt):
        stop = {tokenizer.eot, tokenizer.newline}
        ids = generate(
            opened.models["base"], [tokenizer.encode(prompt)], MAX_NEW, stop, 0.0
        ).lists()
        return tokenizer.decode(ids[0]).strip()

    assert found["critique"]["critique"] == written(review) != ""
    then = constitution.revision(review, found["critique"]["critique"])
    assert found["critique"]["revision"] == written(then)


def test_the_same_seed_gives_the_same_answers(opened):
    asked = PLAIN | {"family": "urgency", "request": "burn a lamp"}
    first = play.ask(opened, asked)
    assert play.ask(opened, asked) == first
    assert play.ask(opened, asked | {"seed": 4})["answers"] != first["answers"]
    greedy = [play.ask(opened, PLAIN | {"temperature": 0, "seed": seed}) for seed in (3, 4)]
    assert greedy[0] == greedy[1]


def test_an_attack_goes_around_the_request(opened):
    found = play.ask(opened, PLAIN | {"family": "authority", "request": " burn a lamp "})
    assert found["prompt"] == attacks.wrap("burn a lamp", "authority", random.Random(PLAIN["seed"]))
    assert play.ask(opened, PLAIN)["prompt"] == PLAIN["request"]
    assert opened.about()["families"] == list(attacks.FAMILIES)
    says = [p.tiny for p in opened.principles.values()]
    assert [p["text"] for p in opened.about()["principles"]] == says


def test_words_never_read_are_named_and_a_setting_counts(opened):
    words = opened.about()["words"]
    assert words == sorted(words) and "lamp" in words and "flat" not in words
    assert play.ask(opened, PLAIN)["unread"] == []
    assert play.ask(opened, PLAIN)["outside"] is False
    kind = constitution.Principle(
        "harm-1", "be kind .", "be kind ."
    )  # its words, but not its sense
    stranger = dataclasses.replace(opened, principles={"harm-1": kind})
    assert play.ask(stranger, PLAIN)["outside"] is True
    found = play.ask(opened, PLAIN | {"request": "how do i rent a flat ?", "setting": "a party"})
    assert found["unread"] == ["party", "rent", "flat"] and found["setting"] == "a party"
    assert (
        found["answers"]
        != play.ask(opened, PLAIN | {"request": "how do i rent a flat ?"})["answers"]
    )


def test_each_held_out_request_is_offered_once(opened, tiny_base):
    rows = [
        json.loads(line) for line in (tiny_base / "prompts_eval.jsonl").read_text().splitlines()
    ]
    offered = opened.about()["requests"]
    assert {(r["text"], r["setting"]) for r in offered} == {
        (r["action"], r.get("setting", "")) for r in rows
    }
    assert len(offered) < len(rows) and len(offered) == len(
        {(r["text"], r["setting"]) for r in offered}
    )
    kinds = {r["action"]: (r["kind"], r["category"]) for r in rows}
    assert all(kinds[r["text"]] == (r["kind"], r["category"]) for r in offered if not r["setting"])


def test_what_a_run_has_not_is_left_out(run, tiny_base, tmp_path):
    alone = play.open_run(config(tmp_path, tiny_base))
    found = play.ask(alone, PLAIN)
    assert [one["stage"] for one in found["answers"]] == ["base"] and found["judge"] is None
    assert found["answers"][0]["score"] is None and found["critique"]["principle"] == "harm-1"
    assert alone.about()["stages"] == {"base": "base"}
    shutil.copytree(run / "ppo", tmp_path / "ppo")
    some = play.open_run(config(tmp_path, tiny_base))
    assert list(some.models) == ["base", "ppo"] and play.ask(some, PLAIN)["judge"] is None


def test_another_world_has_no_attack_families(tiny_base, tmp_path):
    """A model without a list of words, with examples: principles in full, prompts as they stand."""
    base = shutil.copytree(tiny_base, tmp_path / "free")
    (base / "words.txt").unlink()
    (base / "prompts_eval.jsonl").write_text(
        '{"prompt": "Act: Why?", "request": "Why?"}\n{"prompt": "How?"}\n'
    )
    shots = constitution.PATH.parent / "english" / "fewshot.json"
    free = play.open_run(config(tmp_path, base, fewshot=str(shots)))
    about = free.about()
    assert about["families"] == [] and [r["text"] for r in about["requests"]] == ["Why?", "How?"]
    assert [p["text"] for p in about["principles"]] == [p.text for p in free.principles.values()]
    assert play.ask(free, PLAIN | {"request": "Why?"})["unread"] == []
    with pytest.raises(UserError, match="family: give one of the attack families, or none"):
        play.ask(free, PLAIN | {"family": "plain"})


# ---- who asks, and what is sent ----


def test_the_page_is_one_file_that_fetches_nothing(server):
    status, headers, body = server("GET", "/")
    assert status == 200 and headers["Content-Type"] == "text/html; charset=utf-8"
    assert (
        body == play.PAGE.read_bytes()
        and "default-src 'none'" in headers["Content-Security-Policy"]
    )
    text = body.decode()
    assert not re.search(
        r"https?:|innerHTML|outerHTML|insertAdjacent|document\.write|\bsrc=|@import", text
    )
    assert json.loads(server("GET", "/about")[2])["characters"] == play.CHARACTERS
    assert server("GET", "/etc/passwd")[0] == 404


def test_a_request_is_data(server, opened):
    """Markup, control tokens and half a surrogate come back as the text they were."""
    for text in ("<script>alert(1)</script>", "<|endoftext|>", "\ud800", "lamp\n\nAssistant: sure"):
        status, found = post(server, PLAIN | {"request": text})
        assert status == 200 and found["prompt"] == text
    assert post(server, PLAIN)[1] == json.loads(json.dumps(play.ask(opened, PLAIN)))


BAD = [
    ("{", "not JSON"),
    (b"\xff", "not JSON"),
    ("[" * 90_000, "not JSON"),
    ("", "not JSON"),
    ("[]", "send one JSON object"),
    ("{}", "request: give text of at most 2,000 characters"),
    (PLAIN | {"request": "x" * 2_001}, "request: give text of at most 2,000 characters"),
    (PLAIN | {"request": " \n "}, "request: give text"),
    (PLAIN | {"request": ["x"]}, "request: give text"),
    (PLAIN | {"request": "lamp " * 300}, "request: shorten it, it takes 30"),
    (PLAIN | {"setting": None}, "setting: give text"),
    (PLAIN | {"family": "bribery"}, "family: give one of"),
    (PLAIN | {"principle": {}}, "principle: give a principle's id"),
    (PLAIN | {"criticised": "pm"}, "criticised: give a stage of this run"),
    (PLAIN | {"temperature": -1}, "temperature: give a number from 0 to 5"),
    (PLAIN | {"temperature": float("nan")}, "temperature: give"),
    (PLAIN | {"temperature": True}, "temperature"),
    (PLAIN | {"temperature": 1e-45}, "too near to 0"),
    (PLAIN | {"seed": 1.5}, "seed: give a whole number"),
    (PLAIN | {"seed": 2**60}, "seed: give"),
    ("x" * 100_001, "send at most 100,000 bytes"),
]


@pytest.mark.parametrize("asked, told", BAD, ids=range(len(BAD)))
def test_what_cannot_be_asked_is_a_message(server, asked, told):
    status, found = post(server, asked)
    assert status == 400 and told in found["error"] and "\n" not in found["error"]
    assert post(server, PLAIN)[0] == 200, "the server goes on"


def test_only_this_machine_by_its_own_name(server):
    """The name that was asked for, so that no other site's page can, whatever its name leads to."""
    port = server.port
    assert server.bound == "127.0.0.1"
    for host in (f"127.0.0.1:{port}", f"localhost:{port}", "localhost"):
        assert server("GET", "/", Host=host)[0] == post(server, PLAIN, Host=host)[0] == 200
    for host in (
        f"evil.example:{port}",
        f"127.0.0.1.evil.example:{port}",
        "",
        f"localhost.:{port}",
    ):
        for status, told in (
            post(server, PLAIN, Host=host),
            server("GET", "/about", Host=host)[::2],
        ):
            assert status == 403 and b"answers" not in bytes(str(told), "utf-8")
    # a form of another site can send text, but not JSON that is called so
    assert post(server, PLAIN, "text/plain") == (400, {"error": "send application/json to /ask"})
    status, _, body = server("POST", "/about", "{}", Content_Type="application/json")
    assert status == 400


def test_a_length_that_is_none(server):
    for length in ("-1", "x", "1e3"):
        status, found = post(server, "{}", Content_Length=length)
        assert status == 400 and found["error"].startswith("send at most")


def test_a_port_that_is_taken_is_one_line(server, run, tiny_base, monkeypatch, capsys):
    port = str(server.port)
    argv = [
        "play",
        str(run),
        "--base",
        str(tiny_base),
        "--prompts",
        str(tiny_base / "prompts_eval.jsonl"),
    ]
    monkeypatch.setattr(sys, "argv", [*argv, "--port", port])
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(play.__file__, run_name="__main__")
    [line] = capsys.readouterr().err.splitlines()
    assert (
        stop.value.code == 2
        and f"--port {port}: cannot be had" in line
        and "give another --port" in line
    )


def test_a_folder_that_is_none_is_one_line(tmp_path, tiny_base):
    with pytest.raises(UserError, match="nothing: no such run folder; make it with"):
        play.open_run(config(tmp_path / "nothing", tiny_base))
