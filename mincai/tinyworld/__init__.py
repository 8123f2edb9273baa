"""The tiny world: its facts and oracle, its attacks, its corpus, and the base model that reads it.

Only the laboratory and `python -m mincai` may import it: an oracle within reach of a critique, a
label or a reward would train the loop by rules."""
