"""The shape of the code: folders import one way, the oracle stays out of training, nothing is
unpickled.

These are promises about the source and not about its behaviour, so they are checked on the source:
`faults` reads files as text and never imports them. Each rule is also shown to bite, on a planted
violation.
"""

import ast
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

# What the files of a folder may import. "evening" is what stands beside these folders: the files
# that are read first, and by which everything is done. The oracle of the tiny world writes the
# pretraining text and grades in the laboratory: if a critique, a label or a reward could reach it,
# the loop would be trained by rules.
MAY_IMPORT = {
    "evening": {"evening", "plumbing"},
    "scripts": {"evening", "plumbing"},  # train_*.py, which never import each other
    "plumbing": {"evening", "plumbing"},
    "tinyworld": {"evening", "plumbing", "tinyworld"},
    "lab": {"evening", "scripts", "plumbing", "tinyworld", "lab", "main"},
    "main": {
        "evening",
        "scripts",
        "plumbing",
        "tinyworld",
        "lab",
    },  # __main__.py runs every stage, imported by lab only
}
ONLY_FOR = {
    "lab.human": {"lab.controls"}
}  # it labels by the oracle, which no one else may learn from
LIBRARIES = {"torch", "numpy", "tiktoken", "regex", "safetensors", "tqdm"}
UNPICKLERS = {"pickle", "_pickle", "cPickle", "cloudpickle", "dill", "joblib", "shelve", "marshal"}


def folder_of(name):
    """name: as `sources` has it, for instance losses, lab.report, train_sft."""
    if name == "__main__":
        return "main"
    if name.startswith("train_"):
        return "scripts"
    return name.split(".")[0] if "." in name else "evening"


def imports_of(tree):
    """Dotted names a file imports, as far as a module may be meant: `from mincai.lab import page`
    and `from mincai.lab.page import tag` are both mincai.lab.page or more."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            if node.level:
                yield "relative import"
            else:
                yield from (f"{node.module}.{alias.name}" for alias in node.names)


def inner(tree, modules):
    """Which of `modules`, the project's own files, a file imports."""
    for name in imports_of(tree):
        parts = name.removeprefix("mincai.").split(".")
        yield from {".".join(parts[:n]) for n in (1, 2)} & modules


def import_faults(trees):
    graph = {name: set(inner(tree, set(trees))) for name, tree in trees.items()}
    for name, others in graph.items():
        if folder_of(name) not in MAY_IMPORT:
            yield f"{name}: in a folder that MAY_IMPORT does not name"
            continue
        for other in sorted(others):
            if folder_of(other) not in MAY_IMPORT[folder_of(name)]:
                yield f"{name}: imports {other}"
            if name not in ONLY_FOR.get(other, {name}):
                yield f"{name}: imports {other}"
        reached, todo = set(), list(others)
        while todo:
            new = todo.pop()
            if new not in reached:
                reached.add(new)
                todo += graph[new]
        if name in reached:
            yield f"{name}: imports itself, by way of others"


def call_faults(name, tree):
    """Foreign libraries, and every way to unpickle or to import behind this test's back."""
    allowed = LIBRARIES | sys.stdlib_module_names | {"mincai"}
    optional = {
        "plumbing.weights": {"huggingface_hub"},
        "plumbing.formats": {"pyarrow"},
        "lab.works": {"transformers"},
    }  # used where installed
    allowed |= optional.get(name, set())
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
        if isinstance(node, (ast.Name, ast.Attribute)) and getattr(
            node, "id", getattr(node, "attr", "")
        ) in ("import_module", "__import__"):
            yield f"{name}: imports by a string, which no test can follow"


def faults(sources):
    """{module name: source text} to a list of sentences, one for each broken promise."""
    trees = {name: ast.parse(source) for name, source in sources.items()}
    return [
        *import_faults(trees),
        *(fault for name, tree in trees.items() for fault in call_faults(name, tree)),
    ]


def test_the_project_keeps_its_promises():
    package = ROOT / "mincai"
    paths = {
        ".".join(p.relative_to(package).with_suffix("").parts): p for p in package.rglob("*.py")
    }
    paths |= {path.stem: path for path in ROOT.glob("train_*.py")}
    sources = {
        name: path.read_text(encoding="utf-8")
        for name, path in paths.items()
        if path.stem != "__init__"
    }
    assert {"model", "plumbing.data", "lab.evaluate", "train_sft"} <= set(sources), (
        "looked in the wrong folder"
    )
    found = faults(sources)
    assert not found, "\n" + "\n".join(found)


def test_packages_themselves_import_nothing_of_the_project():
    """`import mincai` stays free of torch and of every module: all of them import UserError from
    it."""
    for path in ROOT.glob("mincai/**/__init__.py"):
        tops = {
            name.split(".")[0] for name in imports_of(ast.parse(path.read_text(encoding="utf-8")))
        }
        assert tops <= {"pathlib", "sys"}, path


CLEAN = {
    "model": "import torch\nfrom mincai import UserError\n",
    "critique": "from mincai import constitution, model\nfrom mincai.plumbing import data\n",
    "constitution": "import json\n",
    "plumbing.data": "import json, torch\nimport mincai\nfrom mincai import UserError, model\nx.load()\n",
    "plumbing.cli": "from mincai.plumbing.data import write_jsonl\n",
    "tinyworld.world": "import random\nfrom mincai.plumbing.data import read_jsonl\n",
    "lab.evaluate": "import mincai.tinyworld.world\nfrom mincai.lab import human_free\nimport train_sft\n",
    "lab.human": "from mincai.tinyworld import world\n",
    "lab.controls": "from mincai.lab import human\n",
    "lab.gpucheck": "import mincai.__main__ as pipeline\n",
    "train_sft": "from mincai.plumbing.data import sft_batch\nfrom safetensors.torch import load_file, save_file\n",
    "train_ppo": "from mincai.model import GPT\n",
    "train_pm": "from mincai.model import GPT\n",
    "__main__": "import train_sft, train_ppo\nfrom mincai.lab import evaluate\n",
}


def test_clean_files_have_no_faults():
    assert faults(CLEAN) == []


@pytest.mark.parametrize(
    "name, source, fault",
    [
        ("model", "import mincai.lab.evaluate", "model: imports lab.evaluate"),
        ("model", "from mincai.tinyworld.world import fact", "model: imports tinyworld.world"),
        (
            "critique",
            "def f():\n    from mincai.tinyworld import world",
            "critique: imports tinyworld.world",
        ),
        ("critique", "import mincai.__main__", "critique: imports __main__"),
        ("critique", "import train_sft", "critique: imports train_sft"),
        ("plumbing.data", "from mincai.lab import evaluate", "plumbing.data: imports lab.evaluate"),
        ("plumbing.data", "from mincai.plumbing import cli", "plumbing.data: imports itself"),
        ("model", "from mincai import critique", "model: imports itself"),
        (
            "tinyworld.world",
            "from mincai.lab.evaluate import grade",
            "tinyworld.world: imports lab.evaluate",
        ),
        ("train_sft", "from train_ppo import main", "train_sft: imports train_ppo"),
        (
            "train_pm",
            "if True:\n    import mincai.tinyworld.world as w",
            "train_pm: imports tinyworld.world",
        ),
        ("train_pm", "from . import evaluate", "train_pm: imports relative import"),
        ("lab.evaluate", "from mincai.lab.human import label", "lab.evaluate: imports lab.human"),
        ("attic.gadget", "", "attic.gadget: in a folder that MAY_IMPORT does not name"),
        (
            "train_pm",
            "import importlib as i\ni.import_module('mincai.tinyworld.world')",
            "train_pm: imports by a string",
        ),
        ("train_pm", "__import__('mincai.tinyworld.world')", "train_pm: imports by a string"),
        ("plumbing.data", "import pickle", "plumbing.data: imports pickle"),
        ("plumbing.data", "from cloudpickle import load", "plumbing.data: imports cloudpickle"),
        ("plumbing.data", "import torch\ntorch.load('x')", "plumbing.data: torch.load"),
        ("plumbing.data", "from torch import load as fetch", "plumbing.data: torch.load"),
        (
            "plumbing.data",
            "import numpy\nnumpy.load('x', allow_pickle=True)",
            "plumbing.data: allow_pickle",
        ),
        (
            "model",
            "import transformers",
            "model: imports transformers, which requirements.txt does not list",
        ),
        ("lab.evaluate", "import matplotlib", "lab.evaluate: imports matplotlib"),
    ],
)
def test_a_planted_violation_is_found(name, source, fault):
    found = faults({**CLEAN, name: source})
    assert any(line.startswith(fault) for line in found), found
