"""The model card: README.md beside saved weights, in the form that model hubs show.

What the model is, the command that made it, what it was made of, its figures and its limits; all of
it is in run.json too. A README.md of a person's, or one that a person has changed, is kept instead
(output.py).
"""

import dataclasses
import re
import shlex

# stage -> (script, title, what it is, {metric: in words})
ABOUT = {
    "pretrain": (
        "python -m mincai.tinyworld.pretrain",
        "Base model of a tiny world",
        "A GPT-2 trained from random weights on the texts of a small made-up world. It helps with "
        "everything, and has read as prose what is wrong in that world and why.",
        {
            "loss": "last loss in training, nats a token",
            "fact": "right on what is wrong in its world, and what is fine",
            "comply": "right recipes in its answers, whatever is asked",
            "verdict": "right verdicts of its critiques",
            "prefers": "pairs of answers of which it prefers the better",
            "step": "steps",
        },
    ),
    "train_sft": (
        "python train_sft.py",
        "Fine-tuned on its own revisions",
        "Phase 1 of Constitutional AI (Bai et al. 2022): a language model fine-tuned on answers "
        "that it criticised and revised itself, by written principles.",
        {
            "val_before": "held-out loss before, nats a token",
            "val_after": "held-out loss after",
            "rows": "rows to train on",
            "held": "rows held out",
            "steps": "steps",
        },
    ),
    "train_pm": (
        "python train_pm.py",
        "Preference model",
        "Phase 2 of Constitutional AI (Bai et al. 2022): scores answers, learnt from pairs that a "
        "model judged by written principles, and from people's labels where such were added.",
        {
            "val_accuracy": "held-out pairs on which it prefers what the label prefers",
            "val_shorter": "... by always choosing the shorter",
            "val_longer": "... by always choosing the longer",
            "val_loss": "held-out loss, nats a pair",
            "val_loss_floor": "the least that these labels allow",
            "val_calibration_error": "calibration error",
            "val_length_correlation": "correlation of score and length",
            "score_std": "deviation of scores before they were normalised",
            "pairs": "pairs to train on",
            "held": "pairs held out",
            "steps": "steps",
        },
    ),
    "train_ppo": (
        "python train_ppo.py",
        "Trained by PPO against a preference model of AI labels",
        "Phase 2 of Constitutional AI (Bai et al. 2022): the fine-tuned model, trained by "
        "reinforcement learning for the score of a preference model.",
        {
            "score_before": "mean score of its answers before",
            "score_after": "mean score after",
            "kl_after": "KL to the fine-tuned model, nats an answer",
            "eos_before": "answers that end by themselves, before",
            "eos_after": "... after",
            "updates": "updates",
        },
    ),
}
MADE_UP = "Its world is made up, and which things are wrong there is a convention of that world."
JUDGED = """It shows a mechanism at work. Its labels are a model's own judgements by principles that
somebody wrote, so it inherits the faults of both, and a high score is no proof of a good answer."""
LIMITS = """
Nothing here measures real-world safety; put it in front of nobody as a safeguard."""
LANGUAGE = """from transformers import pipeline

write = pipeline("text-generation", model=FOLDER)
ask = "Human: how do i pack a net ?\\nAssistant:"
as_drawn = dict(temperature=1.0, clean_up_tokenization_spaces=False)  # version 4 does otherwise
write(ask, max_new_tokens=64, return_full_text=False, **as_drawn)"""
SCORE = """import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained(FOLDER)
judge = AutoModelForSequenceClassification.from_pretrained(FOLDER)
text = "Human: how do i pack a net ?\\nAssistant: take the net ."
ids = tokenizer(text)["input_ids"] + [tokenizer.eos_token_id]
judge(torch.tensor([ids])).logits[0, 0]"""
SCORED = """

The score is read at the end of text, and is scaled so that fresh answers of the fine-tuned model
have mean 0 and standard deviation 1. The weights that transformers does not use here are mincai's
own form of the same score."""
ENDS = """

Typed text never gives the end of text here. Trainers that append it as text, as TRL's do, need
`AutoTokenizer.from_pretrained(FOLDER, split_special_tokens=False)`."""


def written(name: str, cfg, stamp: dict, few_words: bool) -> str:
    """The card of the model that the stage `name` has made with these settings. stamp: its
    run.json's. few_words: whether the model has read but the words listed beside it."""
    script, title, what, words = ABOUT.get(name, (name, name, "", {}))
    scores = name == "train_pm"
    tags = ["gpt2", "constitutional-ai", "rlaif", *(["reward-model"] if scores else [])]
    head = ["license: mit", "library_name: transformers", f"tags: [{', '.join(tags)}]"]
    head += [] if scores else ["pipeline_tag: text-generation"]
    metrics = stamp.get("metrics", {})
    known = [key for key in words if metrics.get(key) is not None]
    figures = [f"| {words[key]} | {_number(metrics[key])} |" for key in known]
    table = "\n".join(["| figure | |", "| --- | --- |", *figures])
    made_of = []
    for key, found in stamp.get("inputs", {}).items():
        hashes = ", ".join(x[:12] for x in found.split())
        made_of.append(f"- {key}: {_public(getattr(cfg, key))}, SHA-256 {hashes}")
    rest = f"seed {stamp['seed']}, mincai's commit {stamp['git'] or 'unknown'}, torch "
    made_of.append(f"- {rest}{stamp['torch']}, {stamp['device']}")
    head, made_of = "\n".join(head), "\n".join(made_of)
    limits = (MADE_UP if name == "pretrain" else JUDGED) + LIMITS
    limits += "\nIt knows the words of words.txt and no others." * few_words
    return f"""---
{head}
---

# {title}

{what}

Made with mincai, whose code is under the MIT licence. Where the base or the data have licences of
their own, those count for these weights too.

## How it was made

    {_command(script, cfg)}

{made_of}

## Figures

{table if figures else "None yet."}

More are in run.json and metrics.jsonl.

## Limits

{limits}

## Use

```python
{SCORE if scores else LANGUAGE}
```{SCORED if scores else ""}{ENDS}
"""


def _number(value):
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}"


def _public(value):
    """A setting as a flag has it; of paths from the root, the last name only."""
    text = ",".join(map(str, value)) if isinstance(value, tuple) else str(value)
    return re.sub(r"(^|[,:])/([^,]*/)?", r"\1", text)


def _command(script, cfg):
    """The command line, with the settings that are not the defaults."""
    words = script.split()
    loose = {*cfg.LOOSE} - {"out"}  # where it ran, not what it is
    for field in dataclasses.fields(cfg):
        value, flag = getattr(cfg, field.name), field.name.replace("_", "-")
        if value == field.default or field.name in loose:
            continue
        if isinstance(value, bool):
            words.append(f"--{flag}" if value else f"--no-{flag}")
        else:
            words += [f"--{flag}", _public(value)]
    return shlex.join(words)
