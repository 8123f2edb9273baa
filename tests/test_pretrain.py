"""Going on from a model: its vocabulary stays, and the weights written lie between the old and the new."""

import torch

from mincai import checkpoint, pretrain


def test_a_second_part_is_averaged_with_the_first(tiny_base, tmp_path):
    settings = dict(init=str(tiny_base), tokens=4 * 2 * 256, batch_size=2, focus=0.5, seed=1, lr=0.2, device="cpu",
                    threads=1)
    found = {}
    for average in (1.0, 0.25, 0.0):
        pretrain.main(pretrain.Config(out=str(tmp_path / str(average)), average=average, **settings))
        found[average] = checkpoint.load(tmp_path / str(average)).state_dict()
        for file in ("tokenizer.tiktoken", "prompts.jsonl", "prompts_eval.jsonl"):
            assert (tmp_path / str(average) / file).read_bytes() == (tiny_base / file).read_bytes()
    first, moved = checkpoint.load(tiny_base).state_dict(), 0.0
    for name, old in first.items():
        torch.testing.assert_close(found[0.0][name], old)
        torch.testing.assert_close(found[0.25][name], 0.75 * old + 0.25 * found[1.0][name])
        moved = max(moved, float((found[1.0][name] - old).abs().max()))
    assert moved > 1e-3


def test_the_average_may_be_with_an_earlier_part(tiny_base, tmp_path):
    """Third part on the second, averaged with the first."""
    settings = dict(tokens=2 * 2 * 256, batch_size=2, lr=0.2, device="cpu", threads=1)
    out = {name: str(tmp_path / name) for name in ("second", "alone", "mixed")}
    pretrain.main(pretrain.Config(out=out["second"], init=str(tiny_base), seed=1, **settings))
    more = dict(init=out["second"], seed=2, **settings)
    pretrain.main(pretrain.Config(out=out["alone"], **more))
    pretrain.main(pretrain.Config(out=out["mixed"], average=0.9, average_with=str(tiny_base), **more))
    first, alone, mixed = (checkpoint.load(f).state_dict() for f in (tiny_base, out["alone"], out["mixed"]))
    for name, old in first.items():
        torch.testing.assert_close(mixed[name], 0.1 * old + 0.9 * alone[name])
