"""The parts of a self-contained HTML page: its style sheet, tables, heat maps, token strips, foldable trails.

Every function takes plain text or numbers, escapes them, and returns markup; an argument called `markup` is taken as it
is. Colours are CSS variables, so the page and its figures follow the reader's light or dark setting.
"""

import html
import json
import math
from pathlib import Path

from mincai import UserError, data

STAGES = ("base", "sft", "ppo")
NAMES = {"base": "base", "sft": "SFT", "ppo": "PPO"}

CSS = Path(__file__).with_name("page.css")

# Filtering is all that needs a script; without one every trail is shown.
JS = """
const box=document.querySelector('.filters');if(box){box.hidden=false;let kind='';const find=box.querySelector('input'),
all=[...document.querySelectorAll('details[data-kind]')],count=box.querySelector('output');
const show=()=>{const w=find.value.toLowerCase();let n=0;for(const t of all){t.hidden=!((!kind||t.dataset.kind===kind)&&
t.textContent.toLowerCase().includes(w));n+=!t.hidden}count.textContent=n+' of '+all.length};
for(const b of box.querySelectorAll('button'))b.onclick=()=>{kind=b.dataset.kind;
for(const o of box.querySelectorAll('button'))o.setAttribute('aria-pressed',o===b);show()};find.oninput=show;show()}
"""


def esc(value) -> str:
    """Any value as text that can stand inside an element or a quoted attribute."""
    return html.escape(str(value), quote=True)


def is_rate(value) -> bool:
    return isinstance(value, dict) and {"n", "rate", "low", "high"} <= value.keys()


def percent(x: float) -> str:
    return f"{100 * x:.1f}%"


def plain(value) -> str:
    """A JSON value as short text: rates as percent with interval, floats to three digits, lists with commas."""
    if is_rate(value):
        low, high = 100 * value["low"], 100 * value["high"]
        return f"{percent(value['rate'])} [{low:.1f}, {high:.1f}]" if value["n"] else "none"
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: ""}[value]
    if isinstance(value, float):
        return f"{value:.3g}"
    if isinstance(value, (list, tuple)):
        return ", ".join(map(plain, value))
    if isinstance(value, dict):
        return ", ".join(f"{k} {plain(v)}" for k, v in value.items())
    return str(value)


def nested_rates(found: dict, above: str = "") -> dict[str, dict]:
    """Every rate in nested dicts, named by its path: for files whose exact form is not known here."""
    out = {}
    for key, value in found.items():
        if is_rate(value):
            out[above + key] = value
        elif isinstance(value, dict):
            out |= nested_rates(value, f"{above}{key}: ")
    return out


def turned(r: dict) -> dict:
    """The rate of the opposite."""
    return {**r, "k": r["n"] - r["k"], "rate": 1 - r["rate"], "low": 1 - r["high"], "high": 1 - r["low"]}


# ---- files ----

def read_json(path) -> dict | None:
    """A JSON file, or None where there is none. Raises UserError for one that is broken."""
    path = Path(path)
    if not path.is_file():
        return None
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path}: not JSON ({error}); remove it and run what makes it") from None
    if not isinstance(found, dict):
        raise UserError(f"{path}: a {type(found).__name__}, not an object; remove it and run what makes it")
    return found


def read_rows(path) -> list[dict]:
    """A JSONL file's rows, or none where there is no file."""
    return data.read_jsonl(path) if Path(path).is_file() else []


# ---- blocks ----

def note(text: str, command: str = "") -> str:
    return f'<p class="note">{esc(text)}' + (f" Make it with <code>{esc(command)}</code>." if command else "") + "</p>"


def paragraph(text: str, kind: str = "") -> str:
    return f'<p class="{kind}">{esc(text)}</p>' if kind else f"<p>{esc(text)}</p>"


def section(anchor: str, title: str, *markup: str) -> str:
    return f'<section id="{anchor}"><h2>{esc(title)}</h2>\n' + "\n".join(markup) + "</section>\n"


def heading(text: str) -> str:
    return f"<h3>{esc(text)}</h3>"


def figure(title: str, markup: str, caption: str = "") -> str:
    about = f"<figcaption>{esc(caption)}</figcaption>" if caption else ""
    return f"<figure><h4>{esc(title)}</h4>{markup}{about}</figure>"


def card(label: str, big: str, more: str = "", kind: str = "") -> str:
    return (f'<div class="card"><div class="label">{esc(label)}</div><div class="big {kind}">{esc(big)}</div>'
            f'<div class="more">{esc(more)}</div></div>')


def triple(label: str, parts: list[tuple[str, str, str]]) -> str:
    """One wide card: (stage, big number, what it says below) side by side."""
    inner = "".join(f'<div><div class="big {stage}">{esc(big)}</div><div class="more">{esc(more)}</div></div>'
                    for stage, big, more in parts)
    return f'<div class="card triple"><div class="label">{esc(label)}</div>{inner}</div>'


def steps(title: str, parts: list[tuple[str, str, str, str]]) -> str:
    """A row of boxes joined by arrows: (what, number, more, stage or "")."""
    inner = "".join(f'<li class="{stage}"><span class="what">{esc(what)}</span><b>{esc(number)}</b>'
                    f'<span class="more">{esc(more)}</span></li>' for what, number, more, stage in parts)
    return f'<div class="phase"><h3>{esc(title)}</h3><ol class="steps">{inner}</ol></div>'


def chip(text: str, kind: str = "") -> str:
    return f'<span class="chip {kind}">{esc(text)}</span>'


# ---- tables ----

def table(head: list[str], rows: list[list], wide=(), chips: dict | None = None) -> str:
    """Any values; column numbers in `wide` get room for sentences. chips: text -> "good" or "bad", set as a chip."""
    cells = []
    for row in rows:
        shown = [(plain(v), (chips or {}).get(plain(v).lower())) for v in row]
        cells.append("<tr>" + "".join(
            f'<td{" class=wide" if i in wide else ""}>{esc(text) if kind is None else chip(text, kind)}</td>'
            for i, (text, kind) in enumerate(shown)) + "</tr>")
    top = "".join(f"<th scope=col>{esc(h)}</th>" for h in head)
    look = ' class="wide-table"' if wide else ""
    return (f'<div class="scroll" tabindex="0"><table{look}><thead><tr>{top}</tr></thead>'
            f'<tbody>{"".join(cells)}</tbody></table></div>')


def _rate_cell(r) -> str:
    if not is_rate(r):
        return f"<td>{esc(plain(r))}</td>"
    if not r["n"]:
        return "<td>none</td>"
    return (f'<td title="{esc(r.get("k", "?"))} of {esc(r["n"])}">{percent(r["rate"])}'
            f'<small>{100 * r["low"]:.1f}–{100 * r["high"]:.1f}</small></td>')


def rates(rows: list[tuple[str, dict]], columns=STAGES, first: str = "") -> str:
    """One line a measure, one column a stage (or what `columns` names), each rate over its interval; n where shared."""
    columns = [c for c in columns if any(c in cells for _, cells in rows)]
    body = ""
    for name, cells in rows:
        counts = {c["n"] for c in cells.values() if is_rate(c)}
        body += (f"<tr><th scope=row>{esc(name)}</th><td>{counts.pop() if len(counts) == 1 else ''}</td>"
                 + "".join(_rate_cell(cells.get(c, "")) for c in columns) + "</tr>")
    top = "".join(f'<th scope=col class="{c if c in STAGES else ""}">{esc(NAMES.get(c, c))}</th>' for c in columns)
    return (f'<div class="scroll" tabindex="0"><table><thead><tr><th>{esc(first)}</th><th>n</th>{top}</tr></thead>'
            f"<tbody>{body}</tbody></table></div>")


def shade(v: float) -> str:
    """Attributes of a heat map's cell: v in [0, 1] is how much colour; dark cells get light ink."""
    v = min(1.0, max(0.0, v))
    return f'style="--v:{v:.3f}"' + (' class="hi"' if v > 0.65 else "")


def heat(rows: dict[str, dict[str, object]], columns: list[str], scale=math.sqrt, kind: str = "") -> str:
    """Row -> column -> rate (or number in [0, 1]) as a table whose cells are coloured by scale(value). kind "many":
    narrow columns under upright names, in a colour that does not say bad."""
    body = ""
    for name, cells in rows.items():
        body += f"<tr><th scope=row>{esc(name)}</th>"
        for column in columns:
            found = cells.get(column)
            value = found["rate"] if is_rate(found) else found
            if value is None:
                body += "<td></td>"
                continue
            tip = f"{name}, {column}: {plain(found)}" + (f", n = {found['n']}" if is_rate(found) else "")
            body += f'<td {shade(scale(value))} title="{esc(tip)}">{100 * value:.0f}</td>'
        body += "</tr>"
    top = "".join(f'<th scope=col class="{c if c in STAGES else ""}">{esc(NAMES.get(c, c))}</th>' for c in columns)
    return (f'<div class="scroll" tabindex="0"><table class="heat {kind}"><thead><tr><th></th>{top}</tr></thead>'
            f"<tbody>{body}</tbody></table></div>")


# ---- tokens, trails, samples ----

DECADES = 5  # a probability of 1e-5 or less has the full colour


def surprise(p: float) -> float:
    """0 for a certain token, 1 for one of probability 1e-5 or less; even in log p."""
    return min(1.0, -math.log10(max(p, 1e-30)) / DECADES)


def strip_legend() -> str:
    marks = [(10.0 ** -d, f"{10.0 ** -d:.{d}f}" + " or less" * (d == DECADES)) for d in range(DECADES + 1)]
    return '<div class="legend"><span>probability of the token</span>' + "".join(
        f'<span><i style="--v:{surprise(p):.2f}"></i>{text}</span>' for p, text in marks) + "</div>"


def strip(prompt: str, what: str, stages: dict[str, list[tuple[str, float]]]) -> str:
    """The same answer under each stage, every token coloured by how unlikely it was."""
    out = f'<div class="strip"><p>{esc(prompt)} <span class="soft">{esc(what)}</span></p>'
    for stage, tokens in stages.items():
        whole = math.prod(p for _, p in tokens)
        spans = "".join(f'<span {shade(surprise(p))} title="{esc(text.strip())}: p = {p:.3g}">'
                        f"{esc(text.strip() or text)}</span><wbr>" for text, p in tokens)
        out += (f'<div class="row"><b class="{stage}">{NAMES.get(stage, esc(stage))}</b><div class="tokens">{spans} '
                f"<em>whole: {whole:.2g}</em></div></div>")
    return out + "</div>"


def trail(kind: str, title: str, tags: list[str], parts: list[tuple]) -> str:
    """A foldable story: parts are (heading,), (term, text), (term, text, stage) or (term, text, stage, what of it)."""
    body = ""
    for term, *rest in parts:
        text, stage, more = [*rest, "", "", ""][:3]
        look = f' class="{stage}"' if stage else "" if rest else ' class="head"'
        small = f"<small>{esc(more)}</small>" if more else ""
        body += f"<dt{look}>{esc(term)}</dt>" + (f"<dd>{esc(text)}{small}</dd>" if rest else "")
    return fold(title, "".join(map(chip, tags)), f"<dl>{body}</dl>", kind)


def fold(title: str, markup: str, body: str, kind: str | None = None) -> str:
    """A line that opens: title and `markup` always show, `body` (markup) once opened. kind: what `filters` reads."""
    data_kind = "" if kind is None else f' data-kind="{esc(kind)}"'
    return (f'<details class="trail"{data_kind}><summary><span class="q">{esc(title)}</span>{markup}</summary>'
            f"{body}</details>")


def filters(kinds: list[str]) -> str:
    buttons = "".join(f'<button type="button" data-kind="{esc(k)}" aria-pressed="{"true" if not k else "false"}">'
                      f'{esc(k or "all")}</button>' for k in ["", *kinds])
    return (f'<div class="filters" hidden>{buttons}<input type="search" placeholder="search the trails" '
            f'aria-label="search the trails"><output class="soft"></output></div>')


def document(title: str, *markup: str) -> str:
    """The whole file: one page, nothing fetched."""
    style = CSS.read_text(encoding="utf-8")
    return ('<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
            '<meta name="viewport" content="width=device-width,initial-scale=1">'
            f"<title>{esc(title)}</title><style>{style}</style></head>\n"
            f"<body><main>{''.join(markup)}</main><script>{JS}</script></body></html>\n")
