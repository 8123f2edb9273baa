"""The shape of the code: imports run downward, the oracle stays out of training, nothing is unpickled.

These are promises about the source and not about its behaviour, so they are checked on the source: `faults`
reads files as text and never imports them. Each rule is also shown to bite, on a planted violation.
"""

import ast
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

# Lowest first. A file may import from lower rows only, never from its own.
LAYERS = [
    ["model", "losses", "tokenizer", "constitution", "distributed", "turns", "output", "optim"],
    ["memory"],
    ["checkpoint", "sample", "data", "cli", "table"],
    ["weights", "formats", "planner", "presets", "world", "logprobs"],
    ["critique", "feedback", "ppo", "english"],
    ["red_team"],  # may read the tiny world's topics
    ["corpus"],
    ["measure"],
    ["probes", "human", "assess", "pretrain", "chat", "bench"],
    ["train_sft", "train_pm", "train_ppo", "speed"],
    ["controls", "claims", "page", "trails"],
    ["report"],
    ["evaluate"],
    ["plan"],
    ["__main__"],
    ["gpucheck"],
]
# The oracle writes the pretraining text and grades in evaluation. If it could reach a critique, a label or a
# reward, the loop would be trained by rules.
MAY_REACH_WORLD = {"corpus", "pretrain", "measure", "probes", "trails", "page", "human", "controls", "claims",
                   "report", "evaluate", "red_team", "plan", "__main__", "gpucheck"}
LIBRARIES = {"torch", "numpy", "tiktoken", "regex", "safetensors", "tqdm"}
UNPICKLERS = {"pickle", "_pickle", "cPickle", "cloudpickle", "dill", "joblib", "shelve", "marshal"}
MAX_LINES, MAX_COLUMNS = 400, 120


def imports_of(tree):
    """Dotted names a file imports; `from mincai import data` and `from . import data` are mincai.data."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(filter(None, ["mincai" if node.level else "", node.module]))
            if base == "mincai":
                yield from (f"mincai.{alias.name}" for alias in node.names)
            else:
                yield base


def inner(tree, modules):
    """Which of the project's own files a file imports."""
    for name in imports_of(tree):
        parts = name.split(".")
        if parts[0] == "mincai" and len(parts) > 1 and parts[1] in modules:
            yield parts[1]
        elif parts[0].startswith("train_"):
            yield parts[0]


def import_faults(trees):
    height = {name: row for row, names in enumerate(LAYERS) for name in names}
    graph = {name: set(inner(tree, height)) for name, tree in trees.items()}
    for name in graph:
        if name not in height:
            yield f"{name}: not in LAYERS; give it a place there"
        for other in sorted(graph[name]):
            if height.get(other, 99) >= height.get(name, 99):
                yield f"{name}: imports {other}, which is not below it"
        reached, todo = set(), [name]
        while todo:
            new = graph.get(todo.pop(), set()) - reached
            reached |= new
            todo += new
        if "world" in reached and name not in MAY_REACH_WORLD:
            yield f"{name}: reaches the oracle, world"


def call_faults(name, tree):
    """Foreign libraries, and every way to unpickle or to import behind this test's back."""
    allowed = LIBRARIES | sys.stdlib_module_names | {"mincai"}
    allowed |= {"weights": {"huggingface_hub"}}.get(name, set())  # used where installed
    for module in imports_of(tree):
        top = module.split(".")[0]
        if top in UNPICKLERS:
            yield f"{name}: imports {top}; weights are safetensors, everything else is JSON"
        elif top not in allowed and not top.startswith("train_"):
            yield f"{name}: imports {top}, which requirements.txt does not list"
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module == "torch":
            words = {alias.name for alias in node.names}
        elif isinstance(node, ast.Attribute) and getattr(node.value, "id", None) == "torch":
            words = {node.attr}
        else:
            words = set()
        if words & {"load", "save"}:
            yield f"{name}: torch.load or torch.save; use safetensors"
        if isinstance(node, ast.keyword) and node.arg == "allow_pickle":
            yield f"{name}: allow_pickle"
        if isinstance(node, (ast.Name, ast.Attribute)) and \
                getattr(node, "id", getattr(node, "attr", "")) in ("import_module", "__import__"):
            yield f"{name}: imports by a string, which no test can follow"


def size_faults(name, source):
    lines = source.splitlines()
    if len(lines) > MAX_LINES:
        yield f"{name}: {len(lines)} lines, over {MAX_LINES}"
    for n, line in enumerate(lines, 1):
        if len(line) > MAX_COLUMNS:
            yield f"{name} line {n}: {len(line)} columns, over {MAX_COLUMNS}"


def faults(sources):
    """{module name: source text} to a list of sentences, one for each broken promise."""
    trees = {name: ast.parse(source) for name, source in sources.items() if name != "__init__"}
    found = list(import_faults(trees))
    for name, tree in trees.items():
        found += call_faults(name, tree)
    for name, source in sources.items():
        found += size_faults(name, source)
    return found


def test_the_project_keeps_its_promises():
    paths = [*ROOT.glob("mincai/*.py"), *ROOT.glob("train_*.py")]
    sources = {path.stem: path.read_text(encoding="utf-8") for path in paths}
    assert {"model", "data", "cli"} <= set(sources), "looked in the wrong folder"
    found = faults(sources)
    assert not found, "\n" + "\n".join(found)


def test_the_package_itself_imports_nothing():
    """`import mincai` stays free of torch and of every module: all of them import UserError from it."""
    assert list(imports_of(ast.parse((ROOT / "mincai/__init__.py").read_text(encoding="utf-8")))) == []


CLEAN = {
    "model": "import torch\nfrom mincai import UserError\n",
    "world": "import random\nfrom mincai.data import read_jsonl\n",
    "data": "import json, torch\nimport mincai\nfrom mincai import UserError\nx.load()\n",
    "critique": "from mincai import data, model\n",
    "red_team": "from mincai.world import topics\n",
    "evaluate": "import mincai.world\nfrom mincai import red_team\n",
    "train_sft": "from mincai.data import sft_batch\nfrom safetensors.torch import load_file, save_file\n",
    "train_ppo": "from mincai.model import GPT\n",
    "__main__": "import train_sft, train_ppo\nfrom mincai import evaluate\n",
}


def test_clean_files_have_no_faults():
    assert faults(CLEAN) == []


@pytest.mark.parametrize("name, source, fault", [
    ("model", "import mincai.data", "model: imports data, which is not below it"),
    ("model", "def f():\n    from .losses import gae", "model: imports losses, which is not below it"),
    ("data", "from mincai.cli import arg", "data: imports cli, which is not below it"),
    ("sample", "from . import critique", "sample: imports critique, which is not below it"),
    ("critique", "from mincai import data, feedback", "critique: imports feedback, which is not below it"),
    ("pretrain", "import train_sft", "pretrain: imports train_sft, which is not below it"),
    ("train_sft", "from train_ppo import main", "train_sft: imports train_ppo, which is not below it"),
    ("gadget", "", "gadget: not in LAYERS; give it a place there"),
    ("train_pm", "if True:\n    import mincai.world as w", "train_pm: reaches the oracle, world"),
    ("train_pm", "from mincai.evaluate import grade", "train_pm: reaches the oracle, world"),  # indirectly
    ("train_pm", "import importlib as i\ni.import_module('mincai.world')", "train_pm: imports by a string"),
    ("train_pm", "__import__('mincai.world')", "train_pm: imports by a string"),
    ("data", "import pickle", "data: imports pickle"),
    ("data", "from cloudpickle import load", "data: imports cloudpickle"),
    ("data", "import torch\ntorch.load('x')", "data: torch.load"),
    ("data", "from torch import load as fetch", "data: torch.load"),
    ("data", "import numpy\nnumpy.load('x', allow_pickle=True)", "data: allow_pickle"),
    ("sample", "import transformers", "sample: imports transformers, which requirements.txt does not list"),
    ("evaluate", "import matplotlib", "evaluate: imports matplotlib"),
    ("losses", "x = 1\n" * 401, "losses: 401 lines, over 400"),
    ("losses", "x = 1  # " + "é" * 112, "losses line 1: 121 columns, over 120"),
])
def test_a_planted_violation_is_found(name, source, fault):
    found = faults({**CLEAN, name: source})
    assert any(line.startswith(fault) for line in found), found


@pytest.mark.parametrize("name, source", [("losses", "x = 1\n" * 400), ("losses", "x = 1  # " + "é" * 101)])
def test_the_limits_themselves_are_allowed(name, source):
    assert faults({**CLEAN, name: source}) == []
