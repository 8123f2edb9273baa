"""The code for a GPU, run on one that is pretended (pretend_gpu.py): right devices, and graphs that
can be replayed."""

import dataclasses
import json
import shutil

import pytest
import torch
from pretend_gpu import PRODUCTS, Graph, PretendTensor, graph, pretend
from test_pipeline import LESS, make_it_end
from torch.testing import assert_close

import mincai.__main__ as pipeline
from mincai import UserError, sample
from mincai.lab import bench, gpucheck, report
from mincai.plumbing import data
from mincai.plumbing.cli import precision
from mincai.plumbing.presets import PRESETS

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a real GPU to try")
PROMPTS = [[2, 3, 4], [5, 6, 7, 8, 9], [10]]


@pytest.fixture
def gpu(monkeypatch):
    with pretend(monkeypatch):
        yield "cuda"


# --- it would notice ------------------------------------------------------------------------------------------


def test_two_devices_in_one_operation_are_noticed(gpu):
    there, here = torch.ones(3, device=gpu), torch.ones(3)
    assert (
        isinstance(there, PretendTensor)
        and there.device.type == "cuda"
        and here.device.type == "cpu"
    )
    assert (there + 1).tolist() == [2, 2, 2] and (there + torch.tensor(1.0)).sum().item() == 6
    for work in (
        lambda: there + here,
        lambda: torch.stack([there, here]),
        lambda: here.add_(there),
        lambda: here[torch.zeros(2, dtype=torch.long, device=gpu)],
        lambda: there.numpy(),
        lambda: there.index_fill_(0, torch.tensor([1]), 2.0),
    ):
        with pytest.raises((RuntimeError, TypeError), match="same device|copy it to the CPU"):
            work()
    assert there[torch.tensor([0, 2])].device.type == "cuda"  # torch itself moves these indices
    back = there.to(torch.float64).cpu()
    assert type(back) is torch.Tensor and back.dtype == torch.float64 and here.copy_(there) is here


def test_a_generator_of_the_other_device_is_noticed(gpu):
    assert torch.rand(2, device=gpu, generator=torch.Generator(gpu)).device.type == "cuda"
    for device, other in ((gpu, "cpu"), ("cpu", gpu)):
        with pytest.raises(RuntimeError, match="expected a generator"):
            torch.rand(2, device=device, generator=torch.Generator(other))


def test_a_graph_freezes_what_is_no_tensor_and_refuses_to_wait(gpu):
    count, total, python = torch.zeros(1, device=gpu), torch.zeros(1, device=gpu), [10]

    def step():
        count.add_(1)
        doubled = count * 2
        total.add_(doubled + python[0])
        python[0] += 10

    recorded = Graph()
    with graph(recorded):
        step()
    assert count.item() == total.item() == 0  # recorded, not run
    recorded.replay()
    recorded.replay()
    assert count.item() == 2 and total.item() == 2 + 10 + 4 + 10
    for wait in (
        lambda: int(count),
        lambda: count.tolist(),
        lambda: count.cpu(),
        lambda: count[count > 0],
        lambda: count.nonzero(),
        lambda: torch.ones(1).to(gpu),
    ):
        with pytest.raises(RuntimeError, match="capturing"), graph(Graph()):
            wait()


# --- sampling -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("settings", [dict(n=3), dict(temperature=0.0), dict(then=[4, 5])])
def test_graphs_draw_the_tokens_of_the_cpu(tiny_gpt, seeded, monkeypatch, settings):
    cpu = sample.generate(tiny_gpt, PROMPTS, 20, {1}, generator=seeded(5), **settings)
    with pretend(monkeypatch):
        gpu = sample.generate(tiny_gpt.cuda(), PROMPTS, 20, {1}, generator=seeded(5), **settings)
        assert gpu.ids.device.type == "cuda" and Graph.modes == ["thread_local"]
        assert gpu.lists() == cpu.lists() and max(map(len, cpu.lists())) > 10
        assert_close(gpu.logp.cpu(), cpu.logp, atol=1e-4, rtol=1e-4)
        if cpu.after is not None:
            assert_close(gpu.after.cpu(), cpu.after, atol=1e-4, rtol=1e-4)


def test_a_step_that_counts_in_python_draws_other_tokens(tiny_gpt, seeded, monkeypatch):
    """The test above can fail: here each draw takes its random numbers from a column that the graph
    freezes."""
    uniforms, real, calls = torch.rand(3, 20, generator=seeded(5)), sample.pick, []

    def counting(logits, _, *more):
        calls.append(0)
        return real(logits, uniforms[:, len(calls) - 1].to(logits.device), *more)

    monkeypatch.setattr(sample, "pick", counting)
    monkeypatch.setattr(sample, "_decode_eager", sample._decode_graph)  # which drops no rows
    cpu = sample.generate(tiny_gpt, PROMPTS, 20, set(), uniforms=uniforms).lists()
    calls.clear()
    with pretend(monkeypatch):
        uniforms = uniforms.cuda()
        gpu = sample.generate(tiny_gpt.cuda(), PROMPTS, 20, set(), uniforms=uniforms).lists()
    assert len(calls) == 4  # three before the graph, one in it
    assert [row[:4] for row in gpu] == [row[:4] for row in cpu] and gpu != cpu


def test_in_bfloat16_replays_do_what_steps_do(tiny_gpt, seeded, monkeypatch):
    with monkeypatch.context() as patch, precision("cpu", "bfloat16"):
        patch.setattr(sample, "_decode_eager", sample._decode_graph)
        cpu = sample.generate(tiny_gpt, PROMPTS, 20, {1}, generator=seeded(5), n=2)
    with pretend(monkeypatch), precision("cuda", "bfloat16"):
        gpu = sample.generate(tiny_gpt.cuda(), PROMPTS, 20, {1}, generator=seeded(5), n=2)
        assert gpu.lists() == cpu.lists() and torch.equal(gpu.logp.cpu(), cpu.logp)


def test_float32_products_beside_bfloat16_may_be_fast(monkeypatch):
    precision("cpu", "bfloat16")
    assert torch.get_float32_matmul_precision() == "highest"  # a CPU's would be rounded to 16 bits
    with pretend(monkeypatch):
        for dtype in ("bfloat16", "float32"):
            precision("cuda", dtype)
        precision("cuda:0", "bfloat16")
        assert PRODUCTS == ["high", "highest", "high"]


# --- all of it ------------------------------------------------------------------------------------------------


def test_the_benchmark_and_its_checks(gpu, tmp_path):
    found = bench.main(
        bench.Config(
            model="tiny",
            batch=4,
            micro_batch=2,
            prompt=8,
            max_new=6,
            repeat=1,
            threads=1,
            dtype="bfloat16",
            out=str(tmp_path / "bench.json"),
        )
    )
    assert found["bfloat16 log-probs, largest difference"] < 0.1 and "PPO update: peak GB" in found
    assert json.loads((tmp_path / "bench.json").read_text())["device"] == "a pretended GPU"


def test_the_table_of_the_benchmark(gpu, monkeypatch):
    """On the device, through a graph where it samples; PPO is timed above."""
    some = [bench.Work("sampling", "tiny", 2, 9, 4), bench.Work("judging", "tiny", 2, 9)]
    some.append(bench.Work("SFT step", "tiny", 2, 50))
    monkeypatch.setattr(bench, "rows", lambda device: some if device == "cuda" else [])
    monkeypatch.setattr(bench.works, "ceilings", lambda *_: (1e10, 1e11))
    monkeypatch.setattr(bench, "check_gpu", lambda _: {})
    found = bench.main(bench.Config(repeat=1, threads=1, dtype="bfloat16"))
    assert [row["work"] for row in found["rows"]] == [work.name for work in some]


def less(monkeypatch, **flags):
    """Give the stages test_pipeline's toy numbers, and these."""
    real = pipeline.stages
    monkeypatch.setattr(
        pipeline,
        "stages",
        lambda cfg: [
            (name, stage, dataclasses.replace(config, **LESS.get(name, {}) | flags.get(name, {})))
            for name, stage, config in real(cfg)
        ],
    )


def whole_loop(folder, monkeypatch, device):
    """One run of the toy pipeline, evaluated: what its files hold."""
    with monkeypatch.context() as patch:
        less(patch)
        pipeline.main(
            pipeline.Config(
                out=str(folder / device),
                base=str(folder / "base"),
                scale=0.01,
                device=device,
                threads=1,
            )
        )
    out = folder / device
    rows = {
        name: data.read_jsonl(out / name)
        for name in ("revisions.jsonl", "comparisons.jsonl", "eval_samples.jsonl")
    }
    losses = {
        name: [
            row["loss"] for row in data.read_jsonl(out / name / "metrics.jsonl") if "loss" in row
        ]
        for name in ("sft", "pm")
    }
    return rows, losses, json.loads((out / "eval.json").read_text())


def texts(tree):
    """A row without its numbers, which differ in their last digits."""
    if isinstance(tree, dict):
        return {key: texts(value) for key, value in tree.items()}
    return (
        [texts(x) for x in tree]
        if isinstance(tree, list)
        else None
        if isinstance(tree, float)
        else tree
    )


@pytest.fixture
def toy(tiny_base, tmp_path):
    """A folder with `base`: a model that has learnt nothing, and few prompts to evaluate on."""
    shutil.copytree(tiny_base, tmp_path / "base")
    make_it_end(tmp_path / "base")
    rows = data.read_jsonl(tmp_path / "base" / "prompts_eval.jsonl")
    data.write_jsonl(tmp_path / "base" / "prompts_eval.jsonl", rows[::120])
    return tmp_path


def test_the_whole_loop_is_that_of_the_cpu(toy, monkeypatch):
    """Every stage with its fused optimisers, generators and graphs; numbers and texts as on the
    CPU."""
    rows, losses, _ = whole_loop(toy, monkeypatch, "cpu")
    with pretend(monkeypatch):
        rows_there, losses_there, found = whole_loop(toy, monkeypatch, "cuda")
        assert len(Graph.modes) > 10 and set(Graph.modes) == {"thread_local"}
        assert found["device"] == "a pretended GPU"
        report.main(report.Config(out=str(toy / "cuda")))
        assert (toy / "cuda" / "report.html").stat().st_size > 10_000
    for name, some in rows.items():
        same = sum(texts(a) == texts(b) for a, b in zip(some, rows_there[name]))
        assert len(some) == len(rows_there[name]) and same > 0.9 * len(some), (
            name,
            same,
            len(some),
        )
    assert losses["sft"] and losses["pm"]
    for name, some in losses.items():
        assert_close(losses_there[name], some, atol=1e-3, rtol=1e-3)


def test_the_checks_for_a_card_at_hand(toy, monkeypatch, capsys):
    """gpucheck.py: every stage beside its plan, PPO in both types, and a section more in the
    notes."""
    notes = toy / "notes.md"
    notes.write_text("# Benchmarks\n", encoding="utf-8")
    less(
        monkeypatch,
        **{"AI feedback": dict(max_new=16, samples=24), "evaluate": dict(judged=1, max_new=4)},
    )
    asked = []  # the benchmark itself has a test above
    monkeypatch.setattr(
        gpucheck.bench, "check_gpu", lambda _: {"bfloat16 log-probs, largest difference": 0.0123}
    )
    monkeypatch.setattr(
        gpucheck.bench,
        "main",
        lambda cfg: asked.append(cfg) or {"sampling": 1234.0, "sampling: peak GB": 5.67},
    )
    cfg = gpucheck.Config(
        out=str(toy / "out"),
        notes=str(notes),
        base=str(toy / "base"),
        model="tiny",
        scale=0.01,
        threads=1,
    )
    with pretend(monkeypatch):
        found = gpucheck.main(cfg)
    assert (
        json.loads((toy / "out" / "gpucheck.json").read_text()) == found
        and found["device"] == "a pretended GPU"
    )
    assert [row["stage"] for row in found["stages"]] == [
        name for name, *_ in pipeline.stages(pipeline.Config())
    ]
    assert all(
        row["seconds"] > 0 and row["seconds planned"] > 0 and row["peak planned"] > 0
        for row in found["stages"]
    )
    for dtype in ("float32", "bfloat16"):
        runs = found["curves"][dtype]
        assert len(runs) == 2 and runs[0] != runs[1] and {len(run["score"]) for run in runs} == {2}
        for seed in range(2):
            ran = json.loads((toy / "out" / f"ppo-{dtype}-{seed}" / "run.json").read_text())
            assert (ran["config"]["dtype"], ran["seed"], ran["device"]) == (
                dtype,
                seed,
                "a pretended GPU",
            )
    assert found["curves"]["float32"] != found["curves"]["bfloat16"]
    told = notes.read_text(encoding="utf-8")
    assert (
        told.startswith("# Benchmarks\n\n## a pretended GPU, 20")
        and told[13:] in capsys.readouterr().out
    )
    for text in (
        f"commit {found['git']}",
        "by 0.012 at most",
        "| PPO |",
        "| bfloat16 |",
        "| sampling | 1,234 tokens/s |",
        "| sampling: peak GB | 5.7 GB |",
        "| PPO update: planned GB | 0.",
    ):
        assert text in told, text
    assert (asked[0].model, asked[0].dtype, asked[0].device) == ("tiny", "bfloat16", "cuda")


def test_curves_are_compared_by_hand():
    curves = {
        "float32": [
            {"score": [0.0, 1.0, 2.0, 3.0], "kl": [0, 0, 0, 1.0]},
            {"score": [0.0, 1.0, 2.0, 5.0], "kl": [0, 0, 0, 3.0]},
        ],
        "bfloat16": [
            {"score": [0.0, 1.0, 2.0, 4.0], "kl": [0, 0, 0, 1.0]},
            {"score": [1.0, 1.0, 2.0, 4.5], "kl": [0, 0, 0, 1.0]},
        ],
    }
    assert gpucheck.compare_curves(curves) == {
        "float32 score": 4.0,
        "float32 kl": 2.0,
        "bfloat16 score": 4.25,
        "bfloat16 kl": 1.0,
        "gap between types": 0.5,
        "gap between seeds": 2.0,
    }


@pytest.mark.filterwarnings("ignore:'pin_memory' argument")  # which the pretence does not reach
def test_the_small_preset_on_a_gpu(tmp_path, monkeypatch):
    """At toy numbers, in bfloat16, its base pretrained first, by worker processes."""
    world = dict(
        tokens=3 * 2 * 256,
        n_layer=2,
        n_head=2,
        n_embd=32,
        batch_size=2,
        workers=1,
        compile=False,
        tests=2,
    )
    small = PRESETS["small"]
    monkeypatch.setitem(
        pipeline.PRESETS,
        "small",
        dataclasses.replace(small, base=str(tmp_path / "base"), world=small.world | world),
    )
    with pretend(monkeypatch):
        base = pipeline.stages(pipeline.Config(preset="small", threads=1))[0]
        base[1](base[2])
        assert (
            len(Graph.modes) == 3
        )  # dialogues, reviews and comparisons, written to measure what it can do
        rows = data.read_jsonl(tmp_path / "base" / "prompts_eval.jsonl")
        data.write_jsonl(tmp_path / "base" / "prompts_eval.jsonl", rows[::600])
        make_it_end(tmp_path / "base")  # and its run.json vouches for these prompts
        less(
            monkeypatch,
            **{
                "AI feedback": dict(samples=8, pairs=4, max_new=32),
                "preference model": dict(freeze=1),
            },
            PPO=dict(batch_size=8, minibatches=2, micro_batch=4),
        )
        pipeline.main(
            pipeline.Config(preset="small", out=str(tmp_path / "run"), scale=0.004, threads=1)
        )
    found = json.loads((tmp_path / "run" / "eval.json").read_text())
    assert list(found["stages"]) == ["base", "sft", "ppo"] and found["device"] == "a pretended GPU"
    assert (
        json.loads((tmp_path / "run" / "ppo" / "run.json").read_text())["config"]["dtype"]
        == "bfloat16"
    )


def test_without_a_gpu_the_checks_say_so(tmp_path):
    with pytest.raises(UserError, match="PyTorch sees no GPU here"):
        gpucheck.main(gpucheck.Config(out=str(tmp_path / "out")))
    assert not (tmp_path / "out").exists()
