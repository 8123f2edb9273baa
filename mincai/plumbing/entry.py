"""The commands that an installation brings: each is a file run as a script."""

import runpy
from functools import partial

_run = partial(runpy.run_module, run_name="__main__", alter_sys=True)
loop = partial(_run, "mincai")
critique = partial(_run, "mincai.critique")
train_sft = partial(_run, "train_sft")
feedback = partial(_run, "mincai.feedback")
train_pm = partial(_run, "train_pm")
train_ppo = partial(_run, "train_ppo")
evaluate = partial(_run, "mincai.lab.evaluate")
report = partial(_run, "mincai.lab.report")
chat = partial(_run, "mincai.lab.chat")
play = partial(_run, "mincai.lab.play")
