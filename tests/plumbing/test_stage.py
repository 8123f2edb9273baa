"""How a stage opens: its settings are looked at first, then what is there; and what it writes is
stamped."""

import json
from dataclasses import dataclass, replace

import pytest
import torch

from mincai import Diverged, UserError
from mincai.plumbing import checkpoint, cli, data, distributed, stage
from mincai.plumbing.tokenizer import load_tokenizer


@dataclass(frozen=True)
class Config(stage.Settings):
    rounds: int = cli.arg(2, "rounds", least=1)
    out: str = cli.arg("rows.jsonl", "output")

    def check_out(self):
        raise UserError("looked at the place")


class Rows(Config):
    def check_out(self):
        pass


@pytest.fixture
def cfg(tmp_path):
    return Rows(device="cpu", threads=1, seed=5, out=str(tmp_path / "rows.jsonl"))


@pytest.mark.parametrize(
    "wrong, told",
    [
        (dict(rounds=0), "--rounds 0: give a number of 1 or more"),
        (dict(device="tpu"), "--device tpu: choose auto, cpu or cuda"),
        (dict(dtype="half"), "--dtype half: choose float32 or bfloat16"),
        (dict(threads=-1), "--threads -1: give a number of 0 or more"),
    ],
)
def test_settings_are_checked_before_anything_else(cfg, wrong, told, monkeypatch):
    def never(*_):
        raise AssertionError("it began")

    for module, name in ((distributed, "start"), (cli, "set_threads"), (data, "done")):
        monkeypatch.setattr(module, name, never)
    with pytest.raises(UserError) as error:
        stage.begin("test", replace(cfg, **wrong))
    assert str(error.value) == told


def test_the_place_is_looked_at_unless_the_work_is_done(cfg, capsys):
    work = Config(**vars(cfg))
    with pytest.raises(UserError, match="looked at the place"):
        stage.begin("test", work)
    data.write_jsonl(cfg.out, [{"id": 1}])
    data.write_json(data.sidecar(cfg.out), data.stamp(work))
    assert stage.begin("test", replace(work, threads=2)) is None  # one of LOOSE
    told = f"test: {cfg.out} is there already, made with these settings (--again to redo)\n"
    assert capsys.readouterr().out == told
    with pytest.raises(UserError, match="--rounds 2, now it is 3"):
        stage.begin("test", replace(work, rounds=3))
    with pytest.raises(UserError, match="looked at the place"):
        stage.begin("test", replace(work, rounds=3, again=True))
    assert capsys.readouterr().out == ""


def test_a_stage_that_begins_knows_where_it_runs_and_draws_by_its_seed(cfg, capsys):
    begun = stage.begin("test", cfg)
    assert (begun.name, begun.cfg, begun.device, begun.threads) == ("test", cfg, "cpu", 1)
    assert torch.equal(torch.rand(3), torch.rand(3, generator=torch.Generator().manual_seed(5)))
    assert torch.get_num_threads() == 1 and 0 <= begun.seconds() < 60
    begun.say("hello")
    begun.warn("careful")
    assert capsys.readouterr().out == "test: hello\n  WARNING: careful\n"
    for dtype, on in (("float32", False), ("bfloat16", True)):
        with stage.begin("test", replace(cfg, dtype=dtype)).precision():
            assert torch.is_autocast_enabled("cpu") == on


def test_rows_are_written_with_their_stamp_when_all_are_there(cfg):
    seen = []

    def rows():
        for n in range(3):
            seen.append(n)
            yield {"id": n}

    stage.begin("test", cfg).save_rows(rows(), lambda: {"number": len(seen)})
    assert data.read_jsonl(cfg.out) == [{"id": n} for n in range(3)]
    stamp = json.loads(data.sidecar(cfg.out).read_text())
    assert stamp["number"] == 3 and stamp["config"] == vars(cfg) and stamp["seed"] == 5
    assert stage.begin("test", cfg) is None


def test_other_processes_take_part_in_rows_and_neither_write_nor_speak(
    cfg, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(distributed, "is_main", lambda: False)
    seen, begun = [], stage.begin("test", cfg)
    begun.save_rows((seen.append(n) for n in range(3)), None)
    begun.save_model(None, None, {}, [])
    begun.say("hello")
    begun.warn("careful")
    assert seen == [0, 1, 2] and list(tmp_path.iterdir()) == [] and capsys.readouterr().out == ""


def test_a_model_is_written_with_its_vocabulary_its_logs_and_its_stamp(cfg, tiny_base, tmp_path):
    cfg = replace(cfg, out=str(tmp_path / "model"))
    begun = stage.begin("test", cfg)
    (folder,), tokenizer, (config,) = begun.open(str(tiny_base))
    model = begun.load(folder)
    assert model.config == config == checkpoint.read_config(tiny_base)
    begun.save_model(model, tokenizer, {"loss": 0.5}, [{"step": 1}], samples=[{"a": 1}, {"a": 2}])
    stamp = json.loads((tmp_path / "model" / "run.json").read_text())
    assert stamp["metrics"] == {"loss": 0.5} and stamp["config"] == vars(cfg) and stamp["seed"] == 5
    assert data.read_jsonl(tmp_path / "model" / "metrics.jsonl") == [{"step": 1}]
    assert data.read_jsonl(tmp_path / "model" / "samples.jsonl") == [{"a": 1}, {"a": 2}]
    assert load_tokenizer(tmp_path / "model").ranks == tokenizer.ranks
    shape = json.loads((tmp_path / "model" / "config.json").read_text())
    assert shape["bos_token_id"] == shape["eos_token_id"] == tokenizer.eot
    for a, b in zip(model.parameters(), checkpoint.load(cfg.out).parameters(), strict=True):
        assert torch.equal(a, b)
    assert stage.begin("test", cfg) is None


def test_a_model_of_nan_is_not_written(tiny_gpt, tiny_base, tmp_path):
    begun = stage.begin("train_x", Rows(device="cpu", threads=1, out=str(tmp_path / "out")))
    tiny_gpt.ln_f.weight.data[0] = float("nan")
    with pytest.raises(
        Diverged, match="train_x: ln_f.weight holds NaN or infinity after training; nothing"
    ):
        begun.save_model(tiny_gpt, load_tokenizer(tiny_base), {}, [])
    assert not (tmp_path / "out").exists()


def test_a_model_that_is_not_finished_or_not_as_it_was_is_not_there_already(
    cfg, tiny_base, tiny_gpt, tmp_path
):
    cfg, tokenizer = replace(cfg, out=str(tmp_path / "model")), load_tokenizer(tiny_base)
    stage.begin("test", cfg).save_model(tiny_gpt, tokenizer, {"step": 1}, [], finished=False)
    assert json.loads((tmp_path / "model" / "run.json").read_text())["unfinished"]
    stage.begin("test", cfg).save_model(tiny_gpt, tokenizer, {"step": 2}, [])
    assert stage.begin("test", cfg) is None
    stamp, weights = (tmp_path / "model" / name for name in ("run.json", "model.safetensors"))
    stamp = json.loads(stamp.read_text())
    assert "unfinished" not in stamp and {*stamp["sha256"], "run.json"} == {*stamp["files"]}
    whole = weights.read_bytes()
    flipped = whole[:-1] + bytes([whole[-1] ^ 1])
    for content, told in (
        (flipped, "not as it was"),
        (whole[:99], "not as it was"),
        (None, "gone"),
    ):
        weights.unlink() if content is None else weights.write_bytes(content)
        with pytest.raises(UserError, match=f"^{weights}: is {told}.*, says run.json; .*--again"):
            stage.begin("test", cfg)
    stage.begin("test", replace(cfg, again=True)).save_model(tiny_gpt, tokenizer, {}, [])
    assert stage.begin("test", cfg) is None


def test_a_stamp_tells_of_the_inputs_as_they_were_when_the_stage_began(cfg, tmp_path):
    @dataclass(frozen=True)
    class Reads(Rows):
        prompts: str = str(tmp_path / "prompts.jsonl")

    data.write_jsonl(Reads.prompts, [{"id": 1}])
    cfg = Reads(**vars(cfg))
    begun, first = stage.begin("test", cfg), data.inputs(cfg)
    data.write_jsonl(Reads.prompts, [{"id": 23}])
    begun.save_rows([{"id": 1}], dict)
    assert json.loads(data.sidecar(cfg.out).read_text())["inputs"] == first
    with pytest.raises(UserError, match="prompts.jsonl', which has changed since"):
        stage.begin("test", cfg)
