"""The face of the numbers: rates with their intervals, one table and a few dialogues, as plain text."""

import math

STAGES = ("base", "sft", "ppo")


def wilson(k: int, n: int, z: float = 1.96) -> tuple[float, float]:
    """95% interval of a rate k / n; honest near 0 and 1, where the normal one is empty."""
    if n == 0:
        return 0.0, 1.0
    p, d = k / n, 1 + z * z / n
    half = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n)) / d
    middle = (p + z * z / (2 * n)) / d
    return max(0.0, middle - half), min(1.0, middle + half)


def rate(hits) -> dict:
    """A list of booleans to {k, n, rate, low, high}."""
    hits = list(hits)
    low, high = wilson(sum(hits), len(hits))
    return {"k": sum(hits), "n": len(hits), "rate": sum(hits) / max(1, len(hits)), "low": low, "high": high}


def ratio(a: dict, b: dict) -> dict:
    """{value, low, high}: the rate a over the rate b, two rates of different samples, and its 95% interval on the log
    scale. Half a hit and half a try are added on each side, so that none is infinite (Walters 1985)."""
    (k, n), (m, o) = ((r["k"] + 0.5, r["n"] + 0.5) for r in (a, b))
    middle, spread = math.log(k / n) - math.log(m / o), 1.96 * math.sqrt(max(0.0, 1 / k - 1 / n + 1 / m - 1 / o))
    return {"value": math.exp(middle), "low": math.exp(middle - spread), "high": math.exp(middle + spread)}


def percent(r: dict) -> str:
    """{n, rate, low, high} as '3.2% [2.1, 4.8]'; a rate of nothing is none."""
    if r["n"] == 0:
        return "none"
    return f"{100 * r['rate']:.1f}% [{100 * r['low']:.1f}, {100 * r['high']:.1f}]"


# A key of a stage's summary, and what it is called
ROWS = (("attack_success", "attack success, all families"), ("attack_success_seen", "  families seen in training"),
        ("attack_success_held", "  families held out"), ("attack_by_family", "    {}"),
        ("attack_by_category", "    {}"), ("attack_unseen_category", "  a harm category held out"),
        ("attack_setting", "  under a setting that excuses nothing"),
        ("explained", "harmful requests refused with the true reason"), ("evaded", "  refused without any reason"),
        ("reason_true", "of refusals, those with the true reason"), ("offer_true", "  with a true offer"),
        ("helpful", "ordinary requests helped, whole and right"), ("helpful_plain", "  plain"),
        ("helpful_wrapped", "  wrapped like attacks"), ("over_refusal", "  refused needlessly"),
        ("offer_misplaced", "  an offer where none belongs"),
        ("setting_helpful", "excused by a setting: helped"), ("setting_refused", "  refused"))
GREEDY = ("attack_success", "explained", "helpful", "over_refusal")  # shown of the likeliest answers as well


def table(result: dict) -> str:
    """eval.json as text: rates in percent with their 95% Wilson intervals, one column a stage."""
    stages = [s for s in STAGES if s in result["stages"]]
    lines = ["", f"{'on held-out requests':46} {'n':>5}  " + " ".join(f"{s:>20}" for s in stages)]

    def row(name, cells):
        counts = {c["n"] for c in cells}  # how many refuse, for one, differs from stage to stage
        n = counts.pop() if len(counts) == 1 else "-"
        lines.append(f"{name:46} {n:>5}  " + " ".join(f"{percent(c):>20}" for c in cells))

    found = [result["stages"][s] for s in stages]
    for key, name in ROWS:
        for part in found[0][key] if "{}" in name else (None,):
            row(name.format(part), [f[key] if part is None else f[key][part] for f in found])
    lines.append(f"{'quality: half the explained, half the helped':46}        "
                 + " ".join(f"{100 * f['quality']:19.1f}%" for f in found))
    for key in GREEDY:
        row(f"likeliest answers: {dict(ROWS)[key].strip()}", [result["greedy"][s][key] for s in stages])
    for name, key in (("log-prob a token of complying", "logp_per_token"), ("probability of complying", "probability")):
        lines.append(f"{name:46} {found[0]['attack_success']['n']:5}  "
                     + " ".join(f"{f['compliance'][key]:20.4g}" for f in found))
    lines.append("")
    for stage in stages[1:]:
        seen, every, kept = (100 * result["headline"][f"{stage}_{name}"]
                             for name in ("removed_attack_success_seen", "removed_attack_success", "help_kept"))
        lines.append(f"{stage}: removes {seen:.1f}% of the base's harmful answers on seen families, {every:.1f}% on "
                     f"all; keeps {kept:.1f}% of its help")
    for name, key, parts in (("judge, training principles", "judge_train", "by_about"),
                             ("judge, held-out principles", "judge_held", "by_about"),
                             ("preference model", "pm", "by_kind")):
        if key in result:
            r = result[key]
            bias = f", same slot {100 * r['same_slot']:.1f}%" if "same_slot" in r else ""
            lines.append(f"{name:46} {r['accuracy']['n']:5}  right on {percent(r['accuracy'])}, calibration error "
                         f"{r['calibration_error']:.3f}{bias}")
            lines += [f"  {part:44} {some['n']:5}  {percent(some)}" for part, some in r[parts].items()]
    for split, name in (("train", "critic, training principles"), ("held", "critic, held-out principles")):
        if f"critic_{split}" in result:
            r = result[f"critic_{split}"]
            lines.append(f"{name:46} {r['applies']['n']:5}  applies: breaks it {percent(r['applies'])}; "
                         f"does not apply: keeps it {percent(r['does_not_apply'])}")
    return "\n".join(lines) + "\n"


def dialogues(samples: list[dict], number: int = 3) -> str:
    """The first request of three kinds (harmful and plain, harmful in a held-out family, ordinary) and all answers."""
    wanted = [lambda s: s["split"] == "eval" and s["attack"] == "plain",
              lambda s: s["split"] == "eval" and s["attack"] == "authority",
              lambda s: s["split"] == "eval-twin" and s["attack"] == "urgency"]
    lines = []
    for want in wanted[:number]:
        first = next((s for s in samples if want(s)), None)
        if first:
            lines.append(f"Human: {first['prompt']}")
            lines += [f"  {s['stage']:>4}: {s['answer']}" for s in samples if s["id"] == first["id"]]
            lines.append("")
    return "\n".join(lines)
