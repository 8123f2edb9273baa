"""What the first edition of the tiny world left is named in one line, and mixed with nothing."""

import json
import shutil

import pytest

import mincai.__main__ as pipeline
import train_ppo
import train_sft
from mincai import UserError, critique, feedback
from mincai.lab import evaluate
from mincai.plumbing import data
from mincai.plumbing.tokenizer import load_tokenizer

CPU = dict(device="cpu", threads=1)


def judged(model, judge, prompts, out):
    feedback.main(
        feedback.Config(
            model=model, judge=judge, prompts=f"{prompts}/prompts.jsonl", out=out, **CPU
        )
    )


def critique_by(base, new, out):
    critique.main(critique.Config(model=base, prompts=f"{new}/prompts.jsonl", out=out, **CPU))


def critique_of_prompts(base, new, out):
    critique.main(critique.Config(model=new, prompts=f"{base}/prompts.jsonl", out=out, **CPU))


def fine_tune(base, new, out):
    train_sft.main(train_sft.Config(model=base, out=out, **CPU))


def feedback_on(base, new, out):
    judged(base, new, new, out)


def feedback_by(base, new, out):
    judged(new, base, new, out)


def draw_for_ppo(base, new, out):
    cfg = train_ppo.Config(prompts=f"benign:{base}/prompts.jsonl")
    train_ppo.read_prompts(cfg, load_tokenizer(new), 256)


def the_whole_loop(base, new, out):
    pipeline.main(pipeline.Config(base=base, out=out, **CPU))


def the_whole_loop_on_its_prompts(base, new, out):
    pipeline.main(pipeline.Config(base=new, prompts=base, out=out, **CPU))


@pytest.mark.parametrize(
    "stage",
    [
        critique_by,
        critique_of_prompts,
        fine_tune,
        feedback_on,
        feedback_by,
        draw_for_ppo,
        the_whole_loop,
        the_whole_loop_on_its_prompts,
    ],
)
def test_a_base_of_the_first_edition_is_refused(stage, tiny_base, first_edition, tmp_path):
    with pytest.raises(UserError) as error:
        stage(str(first_edition), str(tiny_base), str(tmp_path / "out.jsonl"))
    message = str(error.value)
    assert message.startswith(f"{first_edition}: ") and "first edition" in message
    assert "data/tiny" in message and "mincai.tinyworld.pretrain" in message and "\n" not in message
    assert not (tmp_path / "out.jsonl").exists()


def test_other_folders_are_not_concerned(tiny_base, tmp_path):
    data.refuse_first_edition(tiny_base)
    data.refuse_first_edition(tmp_path)
    for content in ("{}", "[]", "not JSON", '{"config": []}', '{"config": {"focus": 1}}', "\xff"):
        (tmp_path / "run.json").write_text(content, "latin-1")
        data.refuse_first_edition(tmp_path)


def test_a_run_of_another_base_is_not_gone_on_with(tiny_base, tmp_path):
    """Its revisions would be skipped as done, and the new base's feedback built on them."""
    out = tmp_path / "run"
    shutil.copytree(tiny_base, out / "sft")
    lines = (out / "sft" / "tokenizer.tiktoken").read_bytes().splitlines()
    (out / "sft" / "tokenizer.tiktoken").write_bytes(b"\n".join(lines[:-1]))  # one token less
    with pytest.raises(UserError, match="another base than .*--out.*--again"):
        pipeline.main(pipeline.Config(base=str(tiny_base), out=str(out), **CPU))
    assert [path.name for path in out.iterdir()] == ["sft"]
    assert json.loads((out / "sft" / "run.json").read_text())


def test_a_run_of_another_base_is_not_graded(tiny_base, tmp_path):
    """Its answers would be read with words that mean something else."""
    shutil.copytree(tiny_base, tmp_path / "run" / "sft")
    ranks = (tmp_path / "run" / "sft" / "tokenizer.tiktoken").read_text().splitlines(keepends=True)
    (tmp_path / "run" / "sft" / "tokenizer.tiktoken").write_text("".join(ranks[:-1]))
    with pytest.raises(
        UserError, match="sft has another vocabulary than .*take models made from the same base"
    ):
        evaluate.main(
            evaluate.Config(
                out=str(tmp_path / "run"),
                base=str(tiny_base),
                prompts=str(tiny_base / "prompts_eval.jsonl"),
                **CPU,
            )
        )
