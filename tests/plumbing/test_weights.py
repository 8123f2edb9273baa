"""A name becomes a folder: where it is looked for, how it is fetched, what is refused. Nothing
leaves the machine."""

import hashlib
import json
import shutil
import subprocess
import sys
import types
from pathlib import Path
from urllib.error import URLError

import pytest
import torch

from mincai import UserError
from mincai.model import GPT, GPTConfig
from mincai.plumbing import checkpoint, weights
from mincai.plumbing.tokenizer import from_ranks

REAL_FETCHER = torch.hub.download_url_to_file
# The paper's table has other numbers (117M to 1542M); its authors have corrected them since
PARAMETERS = {
    "gpt2": 124_439_808,
    "gpt2-medium": 354_823_168,
    "gpt2-large": 774_030_080,
    "gpt2-xl": 1_557_611_200,
}
PAGES = [
    f"https://huggingface.co/openai-community/gpt2/resolve/main/{file}" for file in weights.FILES
]


@pytest.fixture(autouse=True)
def machine(tmp_path, monkeypatch):
    """A machine that has no weights, no huggingface_hub and no network: its folder."""
    for name in ("HF_HUB_CACHE", "HF_HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setattr(weights, "WEIGHTS", tmp_path / "data" / "weights")
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    monkeypatch.setattr(torch.hub, "download_url_to_file", None)  # a call would be a TypeError
    (tmp_path / "data").mkdir()
    return tmp_path


@pytest.fixture
def source(tmp_path, tiny_gpt, tiny_config, monkeypatch):
    """What the network would serve: a model of two layers, which is taken for the gpt2 that we
    expect."""
    checkpoint.save(tiny_gpt, tmp_path / "source")
    content = (tmp_path / "source" / "model.safetensors").read_bytes()
    monkeypatch.setitem(weights.SHAPES, "gpt2", tiny_config)
    monkeypatch.setitem(
        weights.PUBLISHED, "gpt2", (len(content), hashlib.sha256(content).hexdigest())
    )
    return tmp_path / "source"


@pytest.fixture
def torch_hub(source, monkeypatch):
    """The real torch.hub, but it finds every page in `source`: the URLs asked for."""
    asked = []

    def download(url, to):
        asked.append(url)
        assert ".partial" in to, "no half a file may lie under the final name"
        REAL_FETCHER((source / url.rsplit("/", 1)[1]).as_uri(), to)  # file://

    monkeypatch.setattr(torch.hub, "download_url_to_file", download)
    return asked


@pytest.fixture
def hub(source, machine, monkeypatch):
    """A huggingface_hub that serves `source` into a cache of its own: the (repository, file) asked
    for."""
    asked = []

    def hf_hub_download(repo_id, filename):
        asked.append((repo_id, filename))
        (machine / "snapshot").mkdir(exist_ok=True)
        return str(shutil.copy(source / filename, machine / "snapshot"))

    monkeypatch.setitem(
        sys.modules, "huggingface_hub", types.SimpleNamespace(hf_hub_download=hf_hub_download)
    )
    return asked


def place(source, folder, files=weights.FILES):
    folder.mkdir(parents=True)
    for file in files:
        shutil.copy(source / file, folder)
    return folder


def snapshot(source, cache, repo="models--openai-community--gpt2", revision="0a"):
    """As huggingface_hub lays its cache out: the snapshot is links to files elsewhere."""
    blobs, folder = cache / repo / "blobs", cache / repo / "snapshots" / revision
    folder.mkdir(parents=True)
    blobs.mkdir(exist_ok=True)
    for file in weights.FILES:
        shutil.copy(source / file, blobs / f"{revision}-{file}")
        (folder / file).symlink_to(f"../../blobs/{revision}-{file}")
    return folder


def refuse(model, *words, call=weights.resolve):
    with pytest.raises(UserError) as caught:
        call(model)
    text = str(caught.value)
    assert "\n" not in text
    for word in words:
        assert str(word) in text, text


def names_in(folder):
    return sorted(path.name for path in folder.iterdir())


# --- what is known of the four ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", weights.SHAPES)
def test_shapes_have_the_stated_number_of_parameters(name):
    with torch.device("meta"):
        model = GPT(weights.SHAPES[name])
    assert sum(p.numel() for p in model.parameters()) == PARAMETERS[name]
    assert model.wte.weight.shape[0] == 50257 and model.wpe.weight.shape[0] == 1024
    assert model.config.n_embd // model.config.n_head == 64


def test_published_size_is_that_of_the_parameters_and_the_stored_masks():
    size, digest = weights.PUBLISHED["gpt2"]
    header = size - 4 * (PARAMETERS["gpt2"] + 12 * 1024 * 1024)
    assert 0 < header < 20_000 and len(bytes.fromhex(digest)) == 32


# --- finding ------------------------------------------------------------------------------------------------


def test_folder_is_returned_as_it_is(source, monkeypatch):
    assert weights.resolve(str(source)) == weights.resolve(source) == source
    monkeypatch.chdir(source.parent)
    (source.parent / "gpt2").mkdir()
    assert weights.resolve("source") == Path("source")
    assert weights.resolve("gpt2") == Path("gpt2")  # a folder goes before a name


@pytest.mark.parametrize(
    "model", ["GPT2", "runs/none", "", "gpt2/", "openai-community/gpt2", "x" * 5000, __file__]
)
def test_anything_else_is_refused_with_the_names(model):
    refuse(model, f"{model}: no such folder", "gpt2, gpt2-medium, gpt2-large, gpt2-xl")


def test_order_of_looking(source, machine, torch_hub):
    cache = machine / "home" / ".cache" / "huggingface" / "hub"
    xl = snapshot(source, cache, "models--openai-community--gpt2-xl")
    for folder in [
        place(source, weights.WEIGHTS / "gpt2"),
        snapshot(source, cache),
        snapshot(source, cache, "models--gpt2"),
    ]:
        assert weights.resolve("gpt2") == folder
        shutil.rmtree(folder)
    assert weights.resolve("gpt2-xl") == xl and torch_hub == []
    weights.resolve("gpt2")
    assert torch_hub == PAGES


def test_where_the_hugging_face_cache_is(source, machine, monkeypatch):
    """The nearer a variable is to the cache the sooner it counts, as in huggingface_hub."""
    expected = snapshot(source, machine / "home" / ".cache" / "huggingface" / "hub")
    assert weights.resolve("gpt2") == expected
    for variable, value, cache in (
        ("XDG_CACHE_HOME", machine / "xdg", "xdg/huggingface/hub"),
        ("HF_HOME", machine / "hf", "hf/hub"),
        ("HF_HUB_CACHE", "~/mine", "home/mine"),
    ):
        monkeypatch.setenv(variable, str(value))
        expected = snapshot(source, machine / cache)
        assert weights.resolve("gpt2") == expected


def test_half_a_model_is_passed_over_and_a_snapshot_loads(source, machine, tiny_gpt):
    cache = machine / "home" / ".cache" / "huggingface" / "hub"
    place(source, weights.WEIGHTS / "gpt2", ["config.json"])
    broken, half, whole = (
        snapshot(source, cache, revision=revision) for revision in ("0a", "0b", "0c")
    )
    (broken / "model.safetensors").resolve().unlink()  # the link stays, its file is gone
    (half / "config.json").unlink()
    assert weights.resolve("gpt2") == whole
    assert torch.equal(checkpoint.load(whole).wte.weight, tiny_gpt.wte.weight)


# --- fetching -----------------------------------------------------------------------------------------------


def test_fetching_without_huggingface_hub(torch_hub, tiny_gpt, capsys):
    folder = weights.resolve("gpt2")
    assert folder == weights.WEIGHTS / "gpt2" and names_in(weights.WEIGHTS) == ["gpt2"]
    assert names_in(folder) == sorted(weights.FILES) and torch_hub == PAGES
    assert torch.equal(checkpoint.load(folder).wte.weight, tiny_gpt.wte.weight)
    assert "fetching about" in capsys.readouterr().err
    assert weights.resolve("gpt2") == folder and torch_hub == PAGES  # once


def test_fetching_with_huggingface_hub(hub, machine):
    assert weights.resolve("gpt2") == machine / "snapshot"
    assert hub == [("openai-community/gpt2", file) for file in weights.FILES]
    assert not weights.WEIGHTS.exists()


def longer(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes() + b"\0")
    expected = weights.PUBLISHED["gpt2"][0]
    return "model.safetensors: ", f"has {expected + 1} bytes, but gpt2's has {expected}"


def altered(folder):
    path = folder / "model.safetensors"
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    found, expected = hashlib.sha256(path.read_bytes()).hexdigest(), weights.PUBLISHED["gpt2"][1]
    return "model.safetensors: ", f"has {found} as SHA-256, but gpt2's has {expected}"


def deeper(folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"n_layer": 3}))
    return "config.json: ", "n_layer is 3, but gpt2 has 2"


def replaced_by_a_log_in_page(folder):
    (folder / "config.json").write_text("<html>Welcome to the hotel</html>")
    return "config.json: ", "not JSON"


DAMAGES = pytest.mark.parametrize("damage", [longer, altered, deeper, replaced_by_a_log_in_page])


@DAMAGES
def test_wrong_file_is_refused_and_removed(source, torch_hub, damage):
    refuse("gpt2", *damage(source))
    assert not weights.WEIGHTS.exists()


@DAMAGES
def test_wrong_file_in_the_cache_of_huggingface_hub_is_refused_and_stays(
    source, hub, machine, damage
):
    """The cache is the library's to manage, and other programs use it."""
    refuse("gpt2", machine / "snapshot", *damage(source))
    assert names_in(machine / "snapshot") == sorted(weights.FILES)


def test_wrong_file_takes_no_others_along(source, torch_hub, tiny_gpt):
    place(source, weights.WEIGHTS / "gpt2-xl")
    place(source, weights.WEIGHTS / "gpt2", ["config.json"])
    refuse("gpt2", *altered(source), "it has been removed")
    assert names_in(weights.WEIGHTS) == ["gpt2", "gpt2-xl"]
    assert [len(names_in(folder)) for folder in sorted(weights.WEIGHTS.iterdir())] == [1, 2]
    checkpoint.save(tiny_gpt, source)
    assert (
        checkpoint.load(weights.resolve("gpt2")).config == tiny_gpt.config
    )  # half a model is completed


def test_what_was_placed_by_hand_stays(source, torch_hub, tmp_path):
    folder = weights.WEIGHTS / "gpt2"
    place(source, folder, ["config.json"])
    mine = (folder / "config.json").read_text() + "\n"
    (folder / "config.json").write_text(mine)
    (folder / "model.safetensors").symlink_to(tmp_path / "gone")
    refuse("gpt2", str(folder / "model.safetensors"), "leads nowhere")
    assert (folder / "model.safetensors").is_symlink() and not torch_hub
    (folder / "model.safetensors").unlink()
    weights.resolve("gpt2")
    assert (folder / "config.json").read_text() == mine and (folder / "model.safetensors").exists()


def test_broken_connection_is_noticed_without_a_checksum(
    source, torch_hub, tiny_config, monkeypatch
):
    monkeypatch.setitem(weights.SHAPES, "gpt2-medium", tiny_config)
    (source / "model.safetensors").write_bytes((source / "model.safetensors").read_bytes()[:-1])
    refuse("gpt2-medium", "model.safetensors", "cannot be read as safetensors")
    assert not weights.WEIGHTS.exists()


@pytest.mark.parametrize("with_hub", [True, False])
def test_no_network_tells_how_to_place_the_files(with_hub, monkeypatch, capsys):
    def fail(*args):
        raise URLError("Name or service not known\nand a second line")

    monkeypatch.setattr(torch.hub, "download_url_to_file", None if with_hub else fail)
    if with_hub:
        monkeypatch.setitem(
            sys.modules, "huggingface_hub", types.SimpleNamespace(hf_hub_download=fail)
        )
    refuse(
        "gpt2",
        "gpt2 could not be fetched",
        "Name or service not known",
        *PAGES,
        "in a browser",
        f"{weights.WEIGHTS / 'gpt2'}/",
        "or give a folder",
    )
    assert "gpt2: not on this machine; fetching about 0.5 GB from https" in capsys.readouterr().err
    assert not weights.WEIGHTS.exists()


@pytest.mark.parametrize("stop", [URLError("reset"), KeyboardInterrupt()])
def test_stopped_in_the_second_file_leaves_nothing(torch_hub, monkeypatch, stop):
    whole = torch.hub.download_url_to_file

    def half(url, to):
        whole(url, to)
        if url.endswith("safetensors"):
            raise stop

    monkeypatch.setattr(torch.hub, "download_url_to_file", half)
    with pytest.raises((UserError, KeyboardInterrupt)):
        weights.resolve("gpt2")
    assert torch_hub == PAGES and not weights.WEIGHTS.exists()


# --- the command, the vocabulary ----------------------------------------------------------------------------


def test_command_prints_one_line(source, torch_hub, tiny_gpt, capsys):
    known = f"{sum(p.numel() for p in tiny_gpt.parameters()):,} parameters, {weights.PUBLISHED['gpt2'][0]:,} bytes"
    weights.main(weights.Config("gpt2"))
    assert capsys.readouterr().out == f"{weights.WEIGHTS / 'gpt2'}: {known}, SHA-256 as published\n"
    weights.main(weights.Config(str(source)))
    assert capsys.readouterr().out == f"{source}: {known}\n"


@DAMAGES
def test_command_checks_what_lies_there_too_and_removes_nothing(source, damage):
    folder = place(source, weights.WEIGHTS / "gpt2")
    refuse(weights.Config("gpt2"), folder, *damage(folder), call=weights.main)
    assert names_in(folder) == sorted(weights.FILES)


def test_command_line_takes_the_model_without_a_flag():
    ran = subprocess.run(
        [sys.executable, "-m", "mincai.plumbing.weights", "gpt5"],
        text=True,
        capture_output=True,
        cwd=Path(__file__).resolve().parents[2],
    )
    assert (ran.returncode, ran.stdout) == (2, "") and ran.stderr.count("\n") == 1
    assert ran.stderr.startswith("mincai: error: gpt5: no such folder")


def test_vocabulary_must_fit_the_embedding():
    tokenizer = from_ranks({bytes([b]): b for b in range(256)})  # and the end of text
    for rows in (257, 320):
        weights.check_vocabulary(GPTConfig(vocab_size=rows), tokenizer, "here")
    with pytest.raises(
        UserError, match="here: the vocabulary has 257 tokens, the embedding only 256 rows"
    ):
        weights.check_vocabulary(GPTConfig(vocab_size=256), tokenizer, "here")
