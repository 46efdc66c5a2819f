"""One self-contained HTML page from one or more serving benchmarks; it fetches nothing.

Knows the JSON of `serve_report` and draws with `svg`. One run: a colour is a load. Several runs:
a colour is a run, and loads that they share stand side by side.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from importlib.resources import files
from typing import Any

from nanovllm.bench.serve_report import load_name, notes, summaries, tables
from nanovllm.bench.summary import CURVE, TARGETS, Spread, Summary, in_flight
from nanovllm.bench.svg import Series, axis, chart, number

NUM_COLORS, NUM_SHADES = 6, 8
LEFT_OUT = 0.05  # share of the smallest values that an axis of times need not show
WIDE = 12  # a ratio from which an axis is logarithmic
X_LABELS = {"rate": "requests offered per second", "concurrency": "concurrent clients"}


@dataclass(frozen=True, slots=True)
class Run:
    """One benchmark's file, by the name that the page gives it."""

    name: str
    content: Mapping[str, Any]
    summaries: Sequence[Summary]

    @property
    def points(self) -> list[tuple[Mapping[str, Any], Summary]]:
        return list(zip(self.content["points"], self.summaries, strict=True))


def page(contents: Sequence[Mapping[str, Any]], names: Sequence[str]) -> str:
    """The whole page; names are unique and stand for the runs."""
    runs = [Run(n, c, summaries(c)) for n, c in zip(names, contents, strict=True)]
    title = f"Serving benchmark: {', '.join(names)}" if len(runs) > 1 else "Serving benchmark"
    body = [
        f"<header><h1>{escape(title)}</h1><p>{escape(_subtitle(runs))}</p></header>",
        _cards(runs[0]) if len(runs) == 1 else "",
        _section("Over load", *_over_load(runs)),
        _section("Distributions", *_distributions(runs)),
        _section("Requests in flight", *_timelines(runs)),
        *(_results(run, alone=len(runs) == 1) for run in runs),
        _setups(runs),
        _words(),
    ]
    frame = files("nanovllm.bench").joinpath("report.html").read_text(encoding="utf-8")
    return frame.replace("{title}", escape(title)).replace("{body}", "\n".join(body))


def _subtitle(runs: Sequence[Run]) -> str:
    if len(runs) > 1:
        return f"{len(runs)} runs compared"
    content = runs[0].content
    server = content["server"]
    name = "" if runs[0].name == server["model"] else f"{runs[0].name} · "
    return f"{name}{server['model']} at {server['url']} · {content['date']}"


def _cards(run: Run) -> str:
    best = max(run.points, key=lambda point: point[1].output_rate)
    first = run.points[0]
    failed = sum(s.num_requests - s.num_done for s in run.summaries)
    total = sum(s.num_requests for s in run.summaries)
    cards = [
        ("Peak output", f"{number(best[1].output_rate)} tok/s", f"at {load_name(best[0]['load'])}"),
        *_first_load_cards(first[1], load_name(first[0]["load"])),
        ("Failed", f"{failed}", f"of {total} requests"),
    ]
    good = [p for p in run.points if p[1].goodput is not None]
    if good:
        top = max(good, key=lambda point: point[1].goodput or 0.0)
        place = f"at {load_name(top[0]['load'])}"
        cards.insert(1, ("Goodput", f"{number(top[1].goodput or 0.0)} req/s", place))
    items = (
        f'<div class="card"><span>{escape(name)}</span><b>{escape(value)}</b>'
        f"<small>{escape(where)}</small></div>"
        for name, value, where in cards
    )
    return f'<div class="cards">{"".join(items)}</div>'


def _first_load_cards(summary: Summary, load: str) -> Iterable[tuple[str, str, str]]:
    named = (("First token, median", summary.ttft), ("Between tokens, median", summary.itl))
    for name, spread in named:
        if spread is not None:
            yield name, f"{number(spread.median)} ms", f"at {load}, p99 {number(spread.p99)} ms"


def _section(title: str, *figures: str) -> str:
    return (
        f'<section><h2>{escape(title)}</h2><div class="grid-2">{"".join(figures)}</div></section>'
    )


def _figure(title: str, drawing: str, legend: Sequence[tuple[str, str, bool]] = ()) -> str:
    """legend: (words, colour class, dashed)"""
    items = "".join(
        f'<li><i class="key {color}{" dashed" if dashed else ""}"></i>{escape(words)}</li>'
        for words, color, dashed in legend
    )
    keys = f"<ul>{items}</ul>" if items else ""
    return f"<figure><figcaption>{escape(title)}</figcaption>{keys}{drawing}</figure>"


# --- over load ----------------------------------------------------------------------------------

Value = Callable[[Summary], float | None]


def _over_load(runs: Sequence[Run]) -> Iterable[str]:
    has_targets = any(s.goodput is not None for run in runs for s in run.summaries)
    for kind in ("rate", "concurrency"):
        if not any(point["load"]["kind"] == kind for run in runs for point, _ in run.points):
            continue
        yield _load_chart(runs, kind, "Output", "tokens/s", {"": lambda s: s.output_rate})
        good: dict[str, Value] = {"goodput": lambda s: s.goodput} if has_targets else {}
        yield _load_chart(
            runs, kind, "Requests done", "requests/s", {"": lambda s: s.request_rate} | good
        )
        for title, name in (("First token", "ttft"), ("Between tokens", "itl")):
            values = {"median": _spread(name, "median"), "p99": _spread(name, "p99")}
            yield _load_chart(runs, kind, title, "ms", values)


def _spread(name: str, part: str) -> Value:
    def value(summary: Summary) -> float | None:
        spread: Spread | None = getattr(summary, name)
        return None if spread is None else float(getattr(spread, part))

    return value


def _load_chart(
    runs: Sequence[Run], kind: str, title: str, unit: str, values: Mapping[str, Value]
) -> str:
    """The first value is a solid line, the second a dashed one."""
    series, legend = [], []
    for index, run in enumerate(runs):
        color = f"c{index % NUM_COLORS}"
        for number_, (words, value) in enumerate(values.items()):
            found = [
                (float(point["load"]["value"]), value(summary))
                for point, summary in run.points
                if point["load"]["kind"] == kind
            ]
            points = sorted((x, y) for x, y in found if y is not None)
            parts = [run.name] if len(runs) > 1 else []
            label = " ".join([*parts, words]).strip() or title.lower()
            series.append(Series(label, color, points, dashed=number_ > 0, dots=True))
            legend.append((label, color, number_ > 0))
    xs = [x for line in series for x, _ in line.points]
    ys = [y for line in series for _, y in line.points]
    x = axis(X_LABELS[kind], xs, log=_is_wide(xs), marked=True)
    y = axis(unit, ys, log=unit == "ms" and _is_wide(ys), unit=f" {unit}")
    return _figure(f"{title}, {unit}", chart(title, series, x, y), legend)


def _is_wide(values: Sequence[float]) -> bool:
    positive = [value for value in values if value > 0]
    return bool(positive) and max(positive) / min(positive) > WIDE


# --- one chart for each load, or one for all loads ----------------------------------------------


Entry = tuple[str, str, Mapping[str, Any]]  # label, colour, point


def _groups(runs: Sequence[Run]) -> list[tuple[str, list[Entry]]]:
    """What stands in one chart: all loads of a single run, or one load of all runs."""
    if len(runs) > 1:
        return _by_load(runs)
    points = runs[0].content["points"]
    shades = [_shade(i, len(points)) for i in range(len(points))]
    return [("", [(load_name(p["load"]), c, p) for p, c in zip(points, shades, strict=True)])]


def _by_load(runs: Sequence[Run]) -> list[tuple[str, list[Entry]]]:
    groups: dict[str, list[Entry]] = {}
    for index, run in enumerate(runs):
        for point in run.content["points"]:
            entry = (run.name, f"c{index % NUM_COLORS}", point)
            groups.setdefault(load_name(point["load"]), []).append(entry)
    return list(groups.items())


def _shade(index: int, count: int) -> str:
    """From the lightest to the strongest."""
    return (
        f"s{round(index * (NUM_SHADES - 1) / max(count - 1, 1)) if count > 1 else NUM_SHADES - 1}"
    )


def _distributions(runs: Sequence[Run]) -> Iterable[str]:
    for group, entries in _groups(runs):
        for title, key in (("First token", "ttft_curve_ms"), ("Between tokens", "itl_curve_ms")):
            series = [
                Series(
                    label, color, [(max(x, 1e-3), y) for x, y in zip(p[key], CURVE, strict=False)]
                )
                for label, color, p in entries
            ]
            # Pieces that arrived together are microseconds apart: the axis leaves them out.
            xs = [x for line in series for x, y in line.points if y >= LEFT_OUT]
            drawing = chart(
                title,
                series,
                axis("milliseconds", xs, log=_is_wide(xs)),
                axis("share of all", [1.0]),
            )
            name = f"{title}, share within a time" + (f", {group}" if group else "")
            yield _figure(name, drawing, [(label, color, False) for label, color, _ in entries])


def _timelines(runs: Sequence[Run]) -> Iterable[str]:
    for group, entries in _by_load(runs):
        series = []
        for label, color, point in entries:
            columns = point["requests"]
            spans = list(zip(columns["started"], columns["ended"], strict=True))
            levels = [(at, float(level)) for at, level in in_flight(spans)]
            series.append(Series(label, color, levels, steps=True))
        xs = [x for line in series for x, _ in line.points]
        ys = [y for line in series for _, y in line.points]
        y = axis("requests in flight", ys, whole=True)
        drawing = chart(group, series, axis("seconds", xs), y)
        legend = [(label, color, False) for label, color, _ in entries]
        yield _figure(group, drawing, legend if len(runs) > 1 else [])


# --- words --------------------------------------------------------------------------------------


def _results(run: Run, *, alone: bool) -> str:
    title = "Results" if alone else f"Results: {run.name}"
    shown = []
    for head, *lines in tables(run.content):
        rows = [_row("th", head), *(_row("td", line) for line in lines)]
        shown.append(f'<div class="scroll"><table>{"".join(rows)}</table></div>')
    said = "".join(f'<p class="note">{escape(note)}</p>' for note in notes(run.content))
    return f"<section><h2>{escape(title)}</h2>{''.join(shown)}{said}</section>"


def _row(tag: str, cells: Iterable[str]) -> str:
    return "<tr>" + "".join(f"<{tag}>{escape(cell)}</{tag}>" for cell in cells) + "</tr>"


def _setups(runs: Sequence[Run]) -> str:
    """How each run was made: one column a run."""
    columns = [_setup(run.content) for run in runs]
    head = _row("th", ["", *(run.name for run in runs)]) if len(runs) > 1 else ""
    lines = [_row("td", [name, *(column[name] for column in columns)]) for name in columns[0]]
    table = f'<table class="setup">{head}{"".join(lines)}</table>'
    return f'<section><h2>Set-up</h2><div class="scroll">{table}</div></section>'


def _setup(content: Mapping[str, Any]) -> dict[str, str]:
    server, client, traffic = content["server"], content["client"], content["traffic"]
    arrivals = f"{traffic['arrival']} arrivals, " if traffic["arrival"] else ""
    targets = ", ".join(f"{name} {limit:g} ms" for name, limit in content["targets_ms"].items())
    return {
        "date": content["date"],
        "server": f"{server['model']} at {server['url']}, version {server['version'] or 'unknown'}",
        "traffic": f"{traffic['endpoint']}, {traffic['input']} tokens in, {traffic['output']} out, "
        f"{traffic['shared_prefix']} shared, {arrivals}seed {traffic['seed']}",
        "sampling": f"temperature {traffic['temperature']:g}, "
        + ("end tokens ignored" if traffic["ignore_eos"] else "ends where the model ends"),
        "goodput targets": targets or "none",
        "load generator": f"nanovllm {client['nanovllm']}, Python {client['python']}, "
        f"{client['num_cores']} cores of {client['cpu']}",
        "command": content["command"],
    }


def _words() -> str:
    told = "".join(
        f"<dt>{escape(name)}</dt><dd>{escape(text)}</dd>"
        for name, text in {
            "in, out": "mean tokens of prompts and answers, as the server counted them",
            "cached": "share of prompt tokens from the server's prefix cache, if it tells",
            "TTFT": "from sending a request to the first text of its answer",
            "ITL": "between two pieces of text; servers may put several tokens into one",
            "TPOT": "mean time per token after the first",
            "e2e": "from sending a request to the end of its answer",
            "late": "p99 of how late the load generator itself was: behind its schedule, or in "
            "looking at what had come",
            "goodput": "requests per second that met every target: "
            + ", ".join(f"{name} is {text}" for name, text in TARGETS.items()),
        }.items()
    )
    return f"<section><h2>Terms</h2><dl>{told}</dl></section>"
