"""What every test may use: a tiny random GPT, and one thread, so that results depend less on the
machine."""

import json
import shutil

import pytest
import torch

from mincai.model import GPT, GPTConfig

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def tiny_config():
    return GPTConfig(vocab_size=64, block_size=64, n_layer=2, n_head=2, n_embd=32)


@pytest.fixture
def tiny_gpt(tiny_config):
    """Fresh for each test, always the same weights, of a size that makes attention and logits
    uneven."""
    with torch.random.fork_rng():
        torch.manual_seed(1234)
        model = GPT(tiny_config)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() == 2:
                    parameter.normal_(std=0.3)  # at 0.02 a wrong mask would hardly move the logits
                else:
                    parameter.add_(
                        0.1 * torch.randn_like(parameter)
                    )  # biases 0 and gains 1 hide mistakes
    return model


@pytest.fixture
def seeded():
    """A function: seed -> torch.Generator."""
    return lambda seed=0: torch.Generator().manual_seed(seed)


@pytest.fixture(scope="session")
def tiny_base(tmp_path_factory):
    """A folder like data/tiny, for reading only: vocabulary, prompts, and a model that has learnt
    nothing."""
    from mincai.tinyworld import (
        pretrain,  # here, so that a fault in one module does not stop the tests of the others
    )

    folder = tmp_path_factory.mktemp("tiny") / "base"
    pretrain.main(
        pretrain.Config(
            out=str(folder),
            tokens=4 * 2 * 256,
            batch_size=2,
            n_layer=1,
            n_head=2,
            n_embd=32,
            device="cpu",
            threads=1,
        )
    )
    return folder


@pytest.fixture
def first_edition(tiny_base, tmp_path):
    """A copy of tiny_base whose run.json says that the first edition's pretraining made it."""
    folder = shutil.copytree(tiny_base, tmp_path / "old")
    settings = json.loads((folder / "run.json").read_text())
    settings["config"] |= {"init": "runs/first", "focus": 0.25, "lies": 0.4, "average": 0.5}
    (folder / "run.json").write_text(json.dumps(settings))
    return folder


@pytest.fixture
def fake_judge(monkeypatch):
    """fake_judge(tokenizer, write, choose): the judge's texts and letters come from here.
    write(prompts) -> token lists of reasons with their stop token; choose(texts) -> log-probs (N,
    2) of "A" and "B" after all that was read."""
    from mincai import feedback

    def start(tokenizer, write, choose):
        letters = [tokenizer.encode(letter)[0] for letter in "AB"]

        def generate_then(model, prompts, max_new, stop, batch_size, then, of, **_):
            assert of == letters
            written = write(prompts)
            return written, choose(
                [tokenizer.decode([*p, *w[:-1], *then]) for p, w in zip(prompts, written)]
            )

        def next_logp(model, prompts, ids, batch_size, journal=None):
            assert ids == letters
            return choose([tokenizer.decode(prompt) for prompt in prompts])

        monkeypatch.setattr(feedback, "generate_then", generate_then)
        monkeypatch.setattr(feedback, "next_logp", next_logp)

    return start
