"""What was made from another base is named in one line, and mixed with nothing."""

import json
import shutil

import pytest

import mincai.__main__ as pipeline
from mincai import UserError
from mincai.lab import evaluate

CPU = dict(device="cpu", threads=1)


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
    with pytest.raises(UserError, match="sft has another vocabulary than .*take models made from the same base"):
        evaluate.main(evaluate.Config(out=str(tmp_path / "run"), base=str(tiny_base),
                                      prompts=str(tiny_base / "prompts_eval.jsonl"), **CPU))
