"""HTML and SVG for the report: text that is escaped unless it says otherwise, tables, boxes, line
charts, one style.

Helpers take plain values and give back `Html`, a string that is markup already. A page needs no
script, fetches nothing, and works from 390 pixels up, light and dark.
"""

import html
import math

from mincai.lab.table import Table, show

FEW = 10  # of fewer than this, a percentage would say more than is known


class Html(str):
    """Markup. Any other string that meets a helper is text, and is escaped."""


def esc(value) -> Html:
    return value if isinstance(value, Html) else Html(html.escape(str(value)))


def tag(name: str, *inside, **attributes) -> Html:
    """<name attributes>inside</name>; class_ is class, aria_label is aria-label, empty ones are
    left out."""
    given = {key.rstrip("_").replace("_", "-"): value for key, value in attributes.items()}
    told = "".join(f' {k}="{html.escape(str(v))}"' for k, v in given.items() if v != "")
    return Html(f"<{name}{told}>{join(inside)}</{name}>")


def join(parts) -> Html:
    return Html("".join(map(esc, parts)))


def text(words, kind: str = "") -> Html:
    return tag("p", words, class_=kind)


def fold(title: str, *parts) -> Html:
    return tag("details", tag("summary", title), *parts)


def said(words, who: str = "", kind: str = "") -> Html:
    return tag("blockquote", tag("b", who) if who else "", text(words), class_=kind)


def boxes(parts: list[tuple]) -> Html:
    """Boxes that lead to one another: (title, number, lines)."""
    made = [
        tag("li", tag("span", title), tag("b", number), *(tag("small", line) for line in lines))
        for title, number, lines in parts
    ]
    return tag("ol", *made, class_="boxes")


def share(cell) -> Html:
    """A cell of a table: a rate as a percentage over its interval, or of a few, k of n; all else as
    text has it."""
    if not isinstance(cell, dict) or "k" not in cell or not cell["n"]:
        return esc(show(cell))
    if cell["n"] < FEW:
        return esc(f"{cell['k']:g} of {cell['n']}")
    low, high = 100 * cell["low"], 100 * cell["high"]
    return join([f"{cell['rate']:.1%}", tag("small", f"{low:.1f}–{high:.1f}")])


def short(value: float) -> str:
    """Three digits that tell: 0.0123, 1.23, 123, 12,345."""
    digits = 2 - math.floor(math.log10(abs(value))) if value else 0
    return f"{value:,.{min(max(0, digits), 6)}f}"


def table(some: Table) -> Html:
    """The first cell of a row is its heading; two spaces in front of it set it in by a step."""
    body = []
    for first, *cells in some.rows:
        steps = min(2, (len(first) - len(first.lstrip())) // 2)
        heading = tag("th", first.strip(), scope="row", class_=f"in{steps}" if steps else "")
        body.append(tag("tr", heading, *(tag("td", share(cell)) for cell in cells)))
    head = tag("tr", *(tag("th", cell, scope="col") for cell in ("", *some.head)))
    made = tag("table", tag("caption", some.caption), tag("thead", head), tag("tbody", *body))
    # It may be wider than the screen, and is then scrolled, by keys as well
    region = {"class_": "scroll", "tabindex": "0", "role": "region", "aria_label": some.caption}
    return tag("div", made, **region)


# ---- line charts ----


def ticks(low: float, high: float, most: int = 5, whole: bool = False) -> list[float]:
    """Round numbers within [low, high], at most `most` + 1 of them, in steps of 1, 2 or 5 times a
    power of ten."""
    least = (high - low) / most
    size = 10.0 ** math.floor(math.log10(least))
    size *= next(m for m in (1, 2, 5, 10) if m * size >= least * (1 - 1e-9))
    size = max(1.0, size) if whole else size
    first, last = math.ceil(low / size - 1e-9), math.floor(high / size + 1e-9)
    return [k * size for k in range(first, last + 1)]


def flat(points: list[tuple]) -> str:
    """What is said in place of a curve of less than two points, or whose range is below 2% of its
    magnitude: an axis would blow up noise. Empty for a curve that is worth drawing."""
    values = [y for _, y in points]
    if len(values) < 2:
        return f"{short(values[0])}, measured once." if values else "not measured."
    low, high = min(values), max(values)
    if low < high and high - low >= 0.02 * max(abs(low), abs(high)):
        return ""
    return f"between {short(low)} and {short(high)} over {points[-1][0]:g} updates, too little to draw."


def words(x, y, what, kind: str = "", anchor: str = "") -> Html:
    return tag("text", what, class_=kind, x=x, y=y, text_anchor=anchor)


def plot(points: list[tuple], left, top, width, height, low=math.inf, high=-math.inf) -> Html:
    """Axes with ticks, the line, its first and last value, as the inside of an <svg>. `flat` points
    cannot be drawn. low, high: what the axis spans at least."""
    xs, ys = zip(*points)
    low, high = min(low, *ys), max(high, *ys)
    margin = 0.15 * (high - low)  # for the first value, where the line leaves it free
    low, high = low - margin, high + margin

    def at(x, y):
        across, down = (x - xs[0]) / (xs[-1] - xs[0]), (high - y) / (high - low)
        return round(left + width * across, 1), round(top + height * down, 1)

    out = []
    for value in ticks(low, high):
        _, y = at(0, value)
        out.append(tag("line", class_="grid", x1=left, x2=left + width, y1=y, y2=y))
        out.append(words(left - 6, f"{y + 4:.1f}", f"{value:.6g}", "soft", "end"))
    for update in ticks(xs[0], xs[-1], 6, whole=True):
        x, _ = at(update, 0)
        out.append(words(x, top + height + 17, f"{update:g}", "soft", "middle"))
    out.append(words(left + width / 2, top + height + 33, "update", "soft", "middle"))
    line = " ".join("{},{}".format(*at(*point)) for point in points)
    out.append(tag("polyline", class_="curve", points=line))
    near = [y for x, y in points if at(x, y)[0] <= left + 50] + [ys[1]]
    rises = max(near) - ys[0] >= ys[0] - min(near)  # the first value stands where the line is not
    for point, right, down in ((points[0], 2, 16 if rises else -8), (points[-1], 7, 4)):
        x, y = at(*point)
        out.append(tag("circle", class_="end", cx=x, cy=y, r=3))
        out.append(words(f"{x + right:.1f}", f"{y + down:.1f}", short(point[1]), "value"))
    return join(out)


def chart(title: str, unit: str, points: list[tuple], **span) -> Html:
    """A curve over updates with its name above it; or its name and a sentence. span: as `plot` has
    it."""
    name, why = (tag("b", title), f", {unit}"), flat(points)
    if why:
        return tag("p", *name, f": {why}", class_="caption")
    (_, first), (update, last) = points[0], points[-1]
    label = f"{title}, {unit}: {short(first)} at first, {short(last)} at update {update:g}"
    frame = {"viewBox": "0 0 400 178", "role": "img", "aria_label": label}
    curve = tag("svg", plot(points, 44, 8, 286, 130, **span), **frame)
    return tag("figure", tag("figcaption", *name), curve)


def picture(stages: list[tuple], score: list[tuple]) -> Html:
    """A drawing that stands alone, 900 by 320: five boxes (title, number, lines) over the curve of
    a score."""
    out = [tag("rect", class_="back", width=900, height=320, rx=10)]
    for x, (title, number, lines) in zip(range(14, 900, 178), stages):
        out.append(tag("rect", class_="box", x=x, y=14, width=160, height=96, rx=8))
        out += [words(x + 11, 37, title), words(x + 11, 61, number, "big")]
        out += [words(x + 11, 82 + 17 * k, line, "soft") for k, line in enumerate(lines)]
        if x > 14:
            out.append(tag("path", class_="arrow", d=f"M{x - 16} 62h12m-4-4l4 4l-4 4"))
    why, name = flat(score), "score of PPO's answers, in deviations"
    out.append(words(14, 138, f"{name}: {why}" if why else name))
    if not why:
        out.append(plot(score, 48, 156, 790, 118))
    about = "; ".join(f"{title} {number}" for title, number, _ in stages)
    head = [tag("title", f"The loop: {about}"), tag("style", Html(COLOURS + SVG))]
    space = "http://www.w3.org/2000/svg"
    frame = {"viewBox": "0 0 900 320", "width": 900, "height": 320, "role": "img"}
    return tag("svg", *head, *out, xmlns=space, **frame)


# ---- the page ----

COLOURS = """:root{--bg:#fcfcfa;--ink:#1e2127;--soft:#5c6370;--rule:#dddbd3;--wash:#f2f1ec;--line:#1d5fd1}
@media(prefers-color-scheme:dark){:root{--bg:#15171b;--ink:#e8e6e1;--soft:#a4aab5;--rule:#343841;--wash:#1f2228;
--line:#7fb0ff}}"""
SVG = """text{font:12px system-ui,-apple-system,"Segoe UI",Roboto,sans-serif;fill:var(--ink)} .end{fill:var(--line)}
.value{font-weight:600;paint-order:stroke;stroke:var(--bg);stroke-width:4px;stroke-linejoin:round}
.grid{stroke:var(--rule)} .curve{fill:none;stroke:var(--line);stroke-width:2} .arrow{stroke:var(--soft);fill:none}
.box{fill:var(--wash);stroke:var(--rule)} text.big{font-size:17px;font-weight:600} .back{fill:var(--bg)}
text.soft{fill:var(--soft)}"""
PAGE = """
:root{color-scheme:light dark} *{box-sizing:border-box} p{margin:.5em 0} a{color:var(--line)} footer{margin-top:4em}
body{margin:0;background:var(--bg);color:var(--ink);font:16px/1.55 system-ui,-apple-system,"Segoe UI",Roboto,sans-serif}
main{max-width:860px;margin:0 auto;padding:32px 20px 80px;overflow-wrap:anywhere} h3{font-size:1rem;margin:0}
h1{font-size:1.7rem;line-height:1.2;margin:0 0 .3em} nav{display:flex;flex-wrap:wrap;gap:2px 16px;font-size:.9rem}
h2{font-size:1.3rem;margin:2.4em 0 .5em;padding-top:.9em;border-top:1px solid var(--rule)} figure,blockquote p{margin:0}
article{margin:0 0 1.8em}
small,.caption,figcaption,caption,footer{font-size:.875rem;color:var(--soft)} details{margin:.7em 0}
code,pre{font:.85em/1.5 ui-monospace,Menlo,Consolas,monospace} summary{cursor:pointer}
pre{overflow-x:auto;overflow-wrap:normal;background:var(--wash);border-radius:8px;padding:12px 14px;margin:.6em 0}
ol{list-style:none;padding:0;margin:1.2em 0} .trail>li{border-left:2px solid var(--rule);padding:0 0 1.1em 18px}
.trail .caption{margin:.1em 0 .4em} main>:nth-child(4) h2{margin-top:1em}
blockquote{margin:.4em 0;padding:8px 12px;background:var(--wash);border-radius:8px}
.won{outline:2px solid var(--line)} blockquote b{font-size:.8rem;color:var(--soft)} figure svg{width:100%;height:auto}
.beside,.boxes,.charts{display:grid;grid-template-columns:repeat(3,minmax(0,1fr));gap:10px} .boxes{gap:14px 28px}
.two,.charts{grid-template-columns:repeat(2,minmax(0,1fr))} .charts{gap:14px 20px} .boxes b{font-size:1.25rem}
.boxes li{position:relative;display:flex;flex-direction:column;padding:10px 14px;line-height:1.4;background:var(--wash);
  border:1px solid var(--rule);border-radius:8px} .boxes li+li::before{content:"\\2192";position:absolute;left:-23px;
  top:calc(50% - .7em);color:var(--soft)} .scroll{overflow-x:auto;margin:.8em 0} caption{text-align:left}
table{border-collapse:collapse;font-size:.9rem;width:100%;font-variant-numeric:tabular-nums;overflow-wrap:normal}
th,td{text-align:left;vertical-align:top;padding:5px 10px 5px 0;font-weight:400} tr{border-bottom:1px solid var(--rule)}
thead th{font-weight:600} td{white-space:nowrap;width:15%} td small{display:block;font-size:.78rem}
tbody th{min-width:7em} .in1{padding-left:1em} .in2{padding-left:2em}
@media(min-width:1000px){main{max-width:1120px;padding-top:20px}
  .trail>li{display:grid;column-gap:20px;padding-bottom:.5em;grid-template-columns:20em minmax(0,1fr)}
  .trail blockquote{padding:5px 12px;margin:.2em 0} .trail blockquote b{margin-right:.6em}
  .trail blockquote p{display:inline} .trail p{margin:.1em 0}
  .trail{font-size:.9375rem;line-height:1.4} .trail details{margin:.2em 0}}
@media(max-width:640px){.charts,.beside,.two,.boxes{grid-template-columns:minmax(0,1fr)} main{padding:20px 16px 60px}
  .boxes{gap:24px} .boxes li+li::before{content:"\\2193";left:50%;top:-24px}}"""
CSS = COLOURS + SVG + PAGE
HEAD = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width,initial-scale=1">"""


def document(title: str, about: str, sections: list[tuple], written: str) -> str:
    """The whole file: sections (anchor, title, markup) under a heading, a few words and links to
    them. written: the last line, which says what wrote it."""
    links = [tag("a", name, href=f"#{anchor}") for anchor, name, _ in sections]
    parts = [tag("section", tag("h2", name, id=anchor), made) for anchor, name, made in sections]
    shown = (tag("h1", title), text(about), tag("nav", *links), *parts, tag("footer", written))
    head = f"{HEAD}<title>{esc(title)}</title><style>{CSS}</style></head>"
    return f"{head}\n<body><main>{join(shown)}</main></body></html>\n"
