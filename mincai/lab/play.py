"""Play with a run in the browser: one request, asked of every stage, and what the loop makes of it.

    python -m mincai.lab.play runs/tiny                  then open http://127.0.0.1:8000
    python -m mincai.lab.play runs/gpt2 --base gpt2 --fewshot data/english/fewshot.json \\
        --prompts data/english/prompts_eval.jsonl

Answers of the base, of phase 1 and of PPO stand side by side, token by token with their
probabilities and their score by the preference model; then the critique and revision of one answer
under one principle, and the judgement of phase 1's answer against PPO's in both orders. Nothing is
written. Only this machine can open the page, which is play.html and fetches nothing from elsewhere.
"""

import contextlib
import json
import random
import threading
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import torch

from mincai import UserError, constitution, critique, shipped
from mincai.feedback import judge
from mincai.lab.assess import manner
from mincai.lab.measure import models_of, run_folder
from mincai.lab.table import NAMES
from mincai.model import GPT, ScalarModel
from mincai.plumbing import data, formats
from mincai.plumbing.checkpoint import load
from mincai.plumbing.cli import arg, pick_device, run, set_threads
from mincai.plumbing.logprobs import answer_scores
from mincai.plumbing.planner import Planner, load_shots, outside
from mincai.plumbing.weights import common_tokenizer, resolve
from mincai.sample import generate
from mincai.tinyworld import attacks

PAGE = Path(__file__).with_name("play.html")
HOST, OTHER_NAME = "127.0.0.1", "localhost"
# What the page may load: what stands in it, and this server's answers
POLICY = (
    "default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'; "
    "connect-src 'self'; frame-ancestors 'none'; form-action 'none'"
)
CHARACTERS, BYTES = 2_000, 100_000  # of a request, and of all that the page may send
OTHERS = 5  # tokens shown beside the one that was drawn


@dataclass(frozen=True)
class Config:
    FIRST = "out"  # also given without its flag
    out: str = arg("runs/tiny", "the run folder; of sft/, pm/ and ppo/ those that are there")
    base: str = arg(shipped("tiny"), "the model it started from: a folder, or gpt2 and its sizes")
    prompts: str = arg(shipped("tiny/prompts_eval.jsonl"), "held-out prompts to choose from")
    constitution: str = arg(str(constitution.PATH), "the principles")
    fewshot: str = arg("", "examples that the base is shown; principles then stand in full words")
    max_new: int = arg(104, "tokens of an answer, a critique or the judge's reasons", least=1)
    port: int = arg(8000, "of 127.0.0.1, where the page is; 0: any free one", least=0, most=65535)
    device: str = arg("auto", "where to compute", choices=("auto", "cpu", "cuda"))
    threads: int = arg(0, "CPU threads, 0 chooses", least=0)


@dataclass(frozen=True)
class Play:
    """A run, opened."""

    models: dict[str, GPT]  # base, sft, ppo, in this order, as far as they are there
    pm: ScalarModel | None
    planner: Planner
    principles: dict[str, constitution.Principle]  # by their id
    requests: list[dict]  # {text, setting, kind, category}
    families: list[str]  # attacks that can be put around a request; none outside the tiny world
    max_new: int

    def about(self) -> dict:
        """What the page can offer."""
        principles = [
            {"id": p.id, "target": p.target, "text": p.text if self.planner.full else p.tiny}
            for p in self.principles.values()
        ]
        found = {"stages": {s: NAMES[s] for s in self.models}, "principles": principles}
        found |= {"requests": self.requests, "families": self.families}
        found["words"] = sorted(self.planner.tokenizer.words or ())
        return found | {"characters": CHARACTERS}


def open_run(cfg: Config) -> Play:
    folders = {"base": resolve(cfg.base)} | models_of(run_folder(cfg.out))
    tokenizer, device = common_tokenizer(*folders.values()), pick_device(cfg.device)
    models = {s: load(folder, device, scalar=s == "pm") for s, folder in folders.items()}
    pm = models.pop("pm", None)
    every = constitution.load_constitution(cfg.constitution)
    planner = Planner(tokenizer, models["base"].config.block_size, load_shots(cfg.fewshot, every))
    # a model of few words has read of the tiny world, whose attacks go around an action
    families = list(attacks.FAMILIES) if tokenizer.words is not None else []
    requests = requests_of(cfg.prompts, "action" if families else "request")
    principles = {p.id: p for p in every}
    return Play(models, pm, planner, principles, requests, families, cfg.max_new)


def requests_of(path, bare: str) -> list[dict]:
    """What to choose from, of a file of prompts: {text, setting, kind, category}, each once. bare:
    what the request without its wrapping is called there."""
    found, texts = {}, ("prompt", bare, "setting", "kind", "category")
    for where, row in data.each_row(path, ("prompt",)):
        formats.need(row, ("prompt",), where, text=texts)
        text, setting = row.get(bare) or row["prompt"], row.get("setting") or ""
        about = {key: row.get(key, "") for key in ("kind", "category")}
        found[text, setting] = {"text": text, "setting": setting, **about}
    return [*found.values()]


# ---- what the models say ----


def check(play: Play, asked) -> None:
    """UserError unless this is all that `ask` needs, and nothing but that is used of it."""
    if not isinstance(asked, dict):
        raise UserError("send one JSON object")
    text, setting, seed = asked.get("request"), asked.get("setting"), asked.get("seed")
    warm, families = asked.get("temperature"), ["", *play.families]
    short = f"text of at most {CHARACTERS:,} characters"
    need = {
        "request": (isinstance(text, str) and 0 < len(text.strip()) <= CHARACTERS, short),
        "setting": (isinstance(setting, str) and len(setting) <= CHARACTERS, f"{short}, or none"),
        "family": (asked.get("family") in families, "one of the attack families, or none"),
        "principle": (asked.get("principle") in [*play.principles], "a principle's id"),
        "criticised": (asked.get("criticised") in [*play.models], "a stage of this run"),
        "temperature": (type(warm) in (int, float) and 0 <= warm <= 5, "a number from 0 to 5"),
        "seed": (type(seed) is int and 0 <= seed < 2**53, "a whole number of 0 or more"),
    }
    for name, (right, wanted) in need.items():
        if not right:
            raise UserError(f"{name}: give {wanted}")


@torch.no_grad()
def probabilities(model: GPT, tokenizer, prompt: list[int], ids: list[int]) -> list[dict]:
    """Of each answer token its text, its probability p at temperature 1 after prompt and answer so
    far, and the likeliest OTHERS: (text, p). End of text has the text ""."""
    tokens = torch.tensor([prompt + ids], device=model.device)
    hidden = model(tokens)[0, len(prompt) - 1 : -1]  # (R, C): token i is predicted at i - 1
    p = torch.softmax(model.unembed(hidden), dim=-1)  # (R, V)
    top = p.topk(OTHERS + 1).indices.tolist()
    found = []
    for row, token, likely in zip(p, ids, top):
        others = [i for i in likely if i != token][:OTHERS]
        others = [(tokenizer.decode([i]), float(row[i])) for i in others]
        found.append({"text": tokenizer.decode([token]), "p": float(row[token]), "others": others})
    return found


def answer(play: Play, stage: str, conversation: str, temperature: float, seed: int) -> dict:
    """One stage's answer: {stage, text, ended, tokens, score}. Every stage draws with the same
    random numbers. The score is None without a preference model, and of an answer cut off."""
    model, planner, tokenizer = play.models[stage], play.planner, play.planner.tokenizer
    kind, stop = manner(stage, tokenizer)
    prompt = planner.prompt(kind, conversation, play.max_new)
    asked = tokenizer.encode(conversation)
    if prompt is None:
        told = f"the models read {planner.limit}, and {play.max_new} are kept for the answer"
        raise UserError(f"request: shorten it, it takes {len(asked)} tokens; {told}")
    draws = torch.Generator().manual_seed(seed)
    (ids,) = generate(model, [prompt], play.max_new, stop, temperature, draws).lists()
    ended, score = ids[-1] in stop, None
    if ended and play.pm is not None:  # it has read no examples, and every end as end of text
        score = float(answer_scores(play.pm, [asked], [[*ids[:-1], tokenizer.eot]]))
    text = constitution.clean(tokenizer.decode(ids))
    found = {"stage": stage, "text": text, "ended": ended, "score": score}
    return found | {"tokens": probabilities(model, tokenizer, prompt, ids)}


def criticise(play: Play, conversation: str, text: str, principle) -> dict:
    """{critique, revision, outcome, ...} of this answer, greedy: one round of phase 1."""
    cfg = critique.Config(rounds=1, temperature=0.0, max_new=play.max_new)
    writer = critique.Writer(play.models["base"], play.planner, cfg, None)
    item = {"conversation": conversation, "original": text, "category": ""}
    critique.critique_rounds(writer, [item], [principle], random.Random(0))
    return item["rounds"][0]


def compare(play: Play, conversation: str, a: str, b: str, principle) -> dict:
    """{p_a, p_ab, p_ba, reasons: with a first, with b first}, as feedback.Verdicts has them."""
    asks = [principle.asks("compare", play.planner.full)] * 2
    model, sizes = play.models["base"], dict(max_new=play.max_new)
    # the pair is given both ways round: a verdict has the reasons of its first order alone
    found = judge(model, play.planner, [conversation] * 2, [a, b], [b, a], asks, **sizes)
    p = {"p_a": found.p_a[0], "p_ab": found.p_ab[0], "p_ba": found.p_ba[0]}
    return p | {"reasons": found.reasons}


def ask(play: Play, asked) -> dict:
    """All that the page shows of one request. UserError for what cannot be asked."""
    check(play, asked)
    prompt, setting, seed = asked["request"].strip(), asked["setting"].strip(), asked["seed"]
    if asked["family"]:
        prompt = attacks.wrap(prompt, asked["family"], random.Random(seed))
    conversation = constitution.dialogue(prompt, setting or None)
    draws = (conversation, asked["temperature"], seed)
    answers = {stage: answer(play, stage, *draws) for stage in play.models}
    texts = {stage: one["text"] for stage, one in answers.items()}
    principle = play.principles[asked["principle"]]
    found = {"prompt": prompt, "setting": setting, "answers": [*answers.values()]}
    found["unread"] = play.planner.tokenizer.unread(conversation)
    found["outside"] = outside(principle, play.planner.tokenizer)
    found["critique"] = found["judge"] = None
    if texts[asked["criticised"]]:
        found["critique"] = criticise(play, conversation, texts[asked["criticised"]], principle)
    if texts.get("sft") and texts.get("ppo"):
        found["judge"] = compare(play, conversation, texts["sft"], texts["ppo"], principle)
    return found


# ---- the page ----


class Handler(BaseHTTPRequestHandler):
    """GET / is the page, GET /about what it offers, POST /ask an answer; self.server has `play` and
    `lock`."""

    timeout = 30  # seconds that a silent connection is kept

    def do_GET(self):
        if not self.local():
            return
        if self.path == "/":
            self.reply(200, PAGE.read_bytes(), "text/html")
        elif self.path == "/about":
            self.reply(200, self.server.play.about())
        else:
            self.reply(404, {"error": "no such page"})

    def do_POST(self):
        if not self.local():
            return
        try:
            asked = self.read()
            with self.server.lock:  # one at a time: two would only wait for each other's cores
                found = ask(self.server.play, asked)
        except UserError as error:
            return self.reply(400, {"error": str(error)})
        self.reply(200, found)

    def local(self) -> bool:
        """Whether this machine is asked by its own name; another page's name may lead here too."""
        name = self.headers.get("Host", "").partition(":")[0]
        if name in (HOST, OTHER_NAME):
            return True
        self.reply(403, {"error": f"open this page as http://{HOST}:{self.server.server_port}"})
        return False

    def read(self):
        """What was sent. JSON has to be called so: no other site's page may send that here."""
        length = self.headers.get("Content-Length", "")
        if self.path != "/ask" or self.headers.get_content_type() != "application/json":
            raise UserError("send application/json to /ask")
        if not length.isdecimal() or int(length) > BYTES:
            raise UserError(f"send at most {BYTES:,} bytes, and say how many")
        try:
            return json.loads(self.rfile.read(int(length)))
        except (ValueError, RecursionError) as error:
            raise UserError(f"not JSON ({error})") from None

    def reply(self, status: int, body, kind="application/json"):
        body = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Type", f"{kind}; charset=utf-8")
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Content-Security-Policy", POLICY)
        with contextlib.suppress(ConnectionError):  # whoever asked may be gone
            self.end_headers()
            self.wfile.write(body)

    def log_message(self, *args):
        """Nothing: the terminal shows what is being computed."""


def start(play: Play, port: int) -> ThreadingHTTPServer:
    """The server, not serving yet. UserError where the port cannot be had."""
    try:
        server = ThreadingHTTPServer((HOST, port), Handler)
    except OSError as error:
        told = f"cannot be had ({error.strerror}); give another --port"
        raise UserError(f"--port {port}: {told}") from None
    server.play, server.lock = play, threading.Lock()
    return server


def main(cfg: Config) -> None:
    set_threads(cfg.threads or 1)  # one row at a time: a second thread only waits
    with start(open_run(cfg), cfg.port) as server, contextlib.suppress(KeyboardInterrupt):
        print(f"play: http://{HOST}:{server.server_port}   Ctrl-C ends.", flush=True)
        server.serve_forever()


if __name__ == "__main__":
    run(main, Config, __doc__)
