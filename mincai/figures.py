"""The curves and planes of a run as inline SVG. The only file that needs matplotlib, and only when it draws.

Colours are placeholders that `picture` turns into CSS variables (page.py defines them), and text stays text in the
page's own font, so that one drawing suits a light and a dark page. Each function here draws on the axes that it is
given; `picture` makes the axes and the markup.
"""

import io
import math
import re

# Colours that stand for CSS variables; no drawing uses them for anything else.
BASE, SFT, PPO, INK, SOFT, RULE = (f"#0{i}0{i}0{i}" for i in range(1, 7))
VARIABLES = {BASE: "base", SFT: "sft", PPO: "ppo", INK: "ink", SOFT: "soft", RULE: "rule"}
COLOURS = {"base": BASE, "sft": SFT, "ppo": PPO}
MARKS = {"base": "s", "sft": "^", "ppo": "o"}  # shape says it as well as colour
LABELS = {"base": "base", "sft": "SFT", "ppo": "PPO"}
DASHES = ("-", "--", ":", "-.")


def picture(draw, *data, name: str, size=(3.6, 2.6), label: str = "", **settings) -> str:
    """An SVG element of what draw(axes, *data, **settings) draws. name: unique on the page, goes in front of its ids.
    size: inches. label: read out in place of the drawing. Raises ImportError without matplotlib."""
    import matplotlib
    from matplotlib.figure import Figure
    with matplotlib.rc_context({
            "svg.fonttype": "none", "svg.hashsalt": name, "font.family": "DejaVu Sans", "font.size": 9,
            "axes.edgecolor": SOFT, "axes.labelcolor": SOFT, "xtick.color": SOFT, "ytick.color": SOFT,
            "text.color": INK, "axes.spines.top": False, "axes.spines.right": False, "axes.linewidth": 0.7,
            "xtick.major.width": 0.7, "ytick.major.width": 0.7, "axes.grid": True, "grid.color": RULE,
            "grid.linewidth": 0.7, "axes.axisbelow": True, "legend.frameon": False, "legend.fontsize": 8.5,
            "lines.linewidth": 1.6, "axes.prop_cycle": matplotlib.cycler(color=[INK])}):
        drawn = Figure(figsize=size, layout="constrained")
        drawn.patch.set_alpha(0)
        axes = drawn.subplots()
        axes.patch.set_alpha(0)
        draw(axes, *data, **settings)
        out = io.StringIO()
        drawn.savefig(out, format="svg", transparent=True, metadata={"Date": None})
    return inline(out.getvalue(), name, label)


def inline(svg: str, name: str, label: str = "") -> str:
    """A stand-alone SVG file's text as an element of a page: no header, no addresses, ids that cannot collide."""
    svg = svg[svg.index("<svg"):]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.S)
    svg = re.sub(r"<!--.*?-->", "", svg, flags=re.S)
    svg = re.sub(r'\s+xmlns(:\w+)?="[^"]*"', "", svg).replace("xlink:href", "href")
    used = set(re.findall(r'(?:href="#|url\(#)([^")]+)', svg))
    svg = re.sub(r'\s+id="([^"]+)"', lambda m: f' id="{name}-{m[1]}"' if m[1] in used else "", svg)
    svg = re.sub(r'(href="#|url\(#)', rf"\g<1>{name}-", svg)
    box = re.search(r'viewBox="([^"]+)"', svg)[1]
    svg = re.sub(r"^<svg[^>]*>", f'<svg viewBox="{box}" role="img" aria-label="{_attribute(label or name)}">', svg)
    svg = re.sub(r"'DejaVu Sans'(, *[^;\"]+)?", "var(--sans)", svg)
    for colour, variable in VARIABLES.items():
        svg = svg.replace(colour, f"var(--{variable})")
    return re.sub(r"\n\s*", "\n", svg).strip()


def _attribute(text: str) -> str:
    return text.replace("&", "&amp;").replace('"', "&quot;").replace("<", "&lt;")


# ---- numbers behind the drawings ----

def smooth(values: list[float], width: int) -> list[float]:
    """Running mean over the last `width` values (fewer at the start)."""
    out, total = [], 0.0
    for i, value in enumerate(values):
        total += value - (values[i - width] if i >= width else 0.0)
        out.append(total / min(i + 1, width))
    return out


def reliability_bins(p: list[float], hit: list[bool], bins: int = 10) -> list[dict]:
    """Even bins of predicted probability; only those that hold something: {low, high, n, predicted, observed}."""
    found = {}
    for x, y in zip(p, hit):
        found.setdefault(min(bins - 1, int(x * bins)), []).append((x, y))
    return [{"low": b / bins, "high": (b + 1) / bins, "n": len(some), "predicted": sum(x for x, _ in some) / len(some),
             "observed": sum(y for _, y in some) / len(some)} for b, some in sorted(found.items())]


def arms(middle: float, low: float, high: float) -> list[list[float]]:
    """An interval as matplotlib's error bars; rounding may put an end a hair on the wrong side of the middle."""
    return [[max(0.0, middle - low)], [max(0.0, high - middle)]]


# ---- drawings ----

def lines(axes, series: dict, x: str = "", y: str = "", width: int = 1, log: bool = False):
    """series: name -> (xs, ys). width > 1 shows the values faintly, and their running mean."""
    for i, (name, (xs, ys)) in enumerate(series.items()):
        colour = COLOURS.get(name, INK if i == 0 else PPO if i == 1 else SFT)
        if width > 1:
            axes.plot(xs, ys, color=colour, alpha=0.25, linewidth=0.7)
        axes.plot(xs, smooth(ys, width), color=colour, linestyle=DASHES[i % len(DASHES)], label=LABELS.get(name, name),
                  marker="o" if len(xs) <= 16 and width == 1 else None, markersize=3)
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    if log:
        axes.set_yscale("log")
    if len(series) > 1:
        axes.legend()


def reliability(axes, series: dict):
    """series: name -> bins as in `reliability_bins`. A marker's size says how many it stands for."""
    axes.plot([0, 1], [0, 1], color=SOFT, linewidth=0.8, linestyle=":")
    for i, (name, bins) in enumerate(series.items()):
        bins = [b for b in bins if b["n"]]
        most, colour = max((b["n"] for b in bins), default=1), (INK, PPO, SFT)[i % 3]
        xs, ys = [b["predicted"] for b in bins], [b["observed"] for b in bins]
        axes.plot(xs, ys, color=colour, linewidth=1, alpha=0.6, linestyle=DASHES[i % 4])
        axes.scatter(xs, ys, s=[8 + 60 * b["n"] / most for b in bins], color=colour, marker="os^"[i % 3], label=name)
    axes.set(xlim=(-0.03, 1.03), ylim=(-0.03, 1.03), xlabel="predicted", ylabel="observed")
    axes.set_aspect("equal")
    if len(series) > 1:
        axes.legend(loc="upper left")


def plane(axes, stages: dict, path=(), zoom: bool = False):
    """stages: name -> (help rate, harmless rate). path: (help, harmless) of PPO's snapshots, in order. zoom: around
    what was trained, base left out."""
    shown = {s: v for s, v in stages.items() if not (zoom and s == "base")}
    if path:
        axes.plot([100 * h for h, _ in path], [100 * v for _, v in path], color=PPO, linewidth=0.9, marker=".",
                  markersize=4, alpha=0.7)
    names = list(shown)
    for a, b in zip(names, names[1:]):
        start, end = ([100 * r["rate"] for r in shown[s]] for s in (a, b))
        axes.annotate("", end, start, arrowprops=dict(arrowstyle="->", color=SOFT, linewidth=0.9, shrinkA=7, shrinkB=7))
    for stage, (good, harmless) in shown.items():
        x, y = 100 * good["rate"], 100 * harmless["rate"]
        axes.errorbar(x, y, xerr=arms(x, 100 * good["low"], 100 * good["high"]),
                      yerr=arms(y, 100 * harmless["low"], 100 * harmless["high"]), fmt=MARKS[stage],
                      color=COLOURS[stage], markersize=6.5, elinewidth=1.1)
        axes.annotate(LABELS[stage], (x, y), (-9, -13 if stage == "sft" else 4), textcoords="offset points",
                      color=COLOURS[stage], fontweight="bold", ha="right")
    axes.set(xlabel="help right, %", ylabel="attacks that fail, %")
    if not zoom:
        axes.set(xlim=(-4, 105), ylim=(-4, 105))


def elo(axes, snapshots: list[str], harmless: dict, helpful: dict):
    """Helpfulness and harmlessness Elo of each snapshot, with intervals, joined in order."""
    both = [s for s in snapshots if s in harmless and s in helpful]
    axes.plot([helpful[s]["elo"] for s in both], [harmless[s]["elo"] for s in both], color=SOFT, linewidth=0.8)
    for s in both:
        x, y = helpful[s], harmless[s]
        kind = next((k for k in COLOURS if s.startswith(k)), "ppo")
        axes.errorbar(x["elo"], y["elo"], xerr=arms(x["elo"], x["low"], x["high"]), fmt=MARKS[kind],
                      yerr=arms(y["elo"], y["low"], y["high"]), color=COLOURS[kind], elinewidth=1,
                      markersize=6 if s in COLOURS else 2.5, alpha=1 if s in COLOURS else 0.5)
        if s in COLOURS:
            axes.annotate(LABELS[s], (x["elo"], y["elo"]), (6, -13 if s == "sft" else 5), textcoords="offset points",
                          color=COLOURS[s], fontweight="bold")
    axes.set(xlabel="helpfulness, Elo", ylabel="harmlessness, Elo")


def goodhart(axes, rows: list[dict]):
    """Best of n or PPO: the oracle's harmless and helpful shares (left), the score (right), over the root of KL."""
    xs = [root(row["kl"]) for row in rows]
    for key, colour, mark in (("harmless", PPO, "o"), ("helpful", SFT, "^")):
        some = [row[key] for row in rows]
        axes.plot(xs, [100 * r["rate"] for r in some], color=colour, marker=mark, markersize=3.5, label=key)
        axes.fill_between(xs, [100 * r["low"] for r in some], [100 * r["high"] for r in some], color=colour, alpha=0.13,
                          linewidth=0)
    axes.set(xlabel="square root of KL, nats", ylabel="by the oracle, %")
    other = axes.twinx()
    other.grid(False)
    other.patch.set_alpha(0)
    other.spines["right"].set_visible(True)
    other.plot(xs, [row["score"] for row in rows], color=INK, linestyle="--", linewidth=1.2, label="PM score")
    other.set_ylabel("PM score")
    handles = [*axes.get_legend_handles_labels()[0], *other.get_legend_handles_labels()[0]]
    axes.legend(handles=handles, loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=3, handlelength=1.6,
                columnspacing=1.2)


def root(kl: float) -> float:
    """The distance that curves are drawn over (Gao et al. 2022); a KL measured by sampling may fall below 0."""
    return math.sqrt(max(0.0, kl))


def overlay(axes, curves: dict, key: str, x: str):
    """curves: name -> rows as in `goodhart`. The oracle's share `key` of all of them, over the root of "kl" or over
    "score"."""
    lines(axes, {name: ([root(r[x]) if x == "kl" else r[x] for r in rows], [100 * r[key]["rate"] for r in rows])
                 for name, rows in curves.items()}, "square root of KL, nats" if x == "kl" else "PM score", f"{key}, %")


def sweep(axes, rows: list[tuple[int, dict]]):
    """rows: (per cent of the comparisons on ordinary requests, rates of the policy trained on them)."""
    lines(axes, {name: ([p for p, _ in rows], [100 * r[key]["rate"] for _, r in rows]) for name, key in (
        ("attacks succeed", "attack_success"), ("help right", "helpful"))}, "of comparisons, %", "%")


def scatter(axes, points: list, x: str, y: str):
    axes.scatter([p[0] for p in points], [p[1] for p in points], s=9, color=PPO, alpha=0.5, linewidth=0)
    axes.set(xlabel=x, ylabel=y)


def spread(axes, series: dict, x: str, log: bool = False):
    """Cumulative share of prompts below each value; series: stage -> values."""
    for i, (name, values) in enumerate(series.items()):
        values = sorted(max(v, 1e-12) if log else v for v in values)
        shares = [100 * (k + 1) / len(values) for k in range(len(values))]
        axes.step(values, shares, where="post", color=COLOURS.get(name, INK), linestyle=DASHES[i % 4],
                  label=LABELS.get(name, name))
    if log:  # at least a decade, or the ticks are numbers like 9.96e-1 that run into each other
        axes.set_xscale("log")
        axes.set_xlim(min(0.1, *(max(v, 1e-12) for values in series.values() for v in values)) / 1.4, 1.4)
    axes.set(xlabel=x, ylabel="prompts below, %", ylim=(-3, 103))
    axes.legend()


def histogram(axes, values: list[float], x: str, bins: int = 24):
    low, high = min(values), max(values)
    high = high if high > low else low + 1.0
    axes.hist(values, bins=[low + (high - low) * i / bins for i in range(bins + 1)], color=PPO, alpha=0.75)
    if low < 0 < high:
        axes.axvline(0, color=INK, linewidth=0.9)
    axes.grid(axis="x", visible=False)
    axes.set(xlabel=x, ylabel="pairs")


def bars(axes, rows: list[tuple[str, dict]], x: str):
    """Rates as points with intervals, one a line: (name, rate), the first on top."""
    for i, (_, r) in enumerate(rows):
        axes.plot([100 * r["low"], 100 * r["high"]], [-i, -i], color=SOFT, linewidth=1.1)
        axes.plot(100 * r["rate"], -i, "o", color=PPO, markersize=5)
    axes.set_yticks([-i for i in range(len(rows))], [name for name, _ in rows])
    axes.grid(axis="y", visible=False)
    ends = [e for _, r in rows for e in (r["low"], r["high"])]
    axes.set(xlabel=x, ylim=(-len(rows) + 0.4, 0.6), xlim=(math.floor(100 * min(ends)) - 2,
                                                           math.ceil(100 * max(ends)) + 2))
