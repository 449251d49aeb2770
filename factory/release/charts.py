"""The report's charts: small functions that return inline SVG, coloured by the page's CSS variables.

Every number drawn also stands in a table or a sentence beside the chart, where it can be read and copied.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup, escape


@dataclass(frozen=True)
class Segment:
    """One part of a stacked bar; `tone` is a CSS class (accepted, rejected, failed, waiting)."""

    label: str
    value: int
    tone: str


def stacked_bar(segments: Sequence[Segment], title: str) -> Markup:
    """One horizontal bar whose parts are proportional to their values; the gaps between parts are the page's."""
    total = sum(s.value for s in segments)
    parts, x = [], 0.0
    for segment in segments:
        if not segment.value:
            continue
        width = 1000.0 * segment.value / total
        parts.append(
            f'<rect class="seg {segment.tone}" x="{x:.2f}" y="0" width="{max(width - 2, 1):.2f}" height="28">'
            f"<title>{escape(segment.label)}: {segment.value:,}</title></rect>"
        )
        x += width
    return _svg("stacked", "0 0 1000 28", title, "".join(parts), stretch=True)


def rate_bar(share: float, low: float, high: float, title: str) -> Markup:
    """A share of 1 as a bar from zero, with its interval as a whisker."""
    body = (
        '<rect class="track" x="0" y="6" width="1000" height="8"/>'
        f'<rect class="fill" x="0" y="6" width="{_at(share):.1f}" height="8"/>'
        f'<rect class="whisker" x="{_at(low):.1f}" y="9" width="{max(_at(high) - _at(low), 2):.1f}" height="2"/>'
        f'<rect class="whisker" x="{_at(low) - 1.5:.1f}" y="4" width="3" height="12"/>'
        f'<rect class="whisker" x="{_at(high) - 1.5:.1f}" y="4" width="3" height="12"/>'
    )
    return _svg("rate", "-4 0 1008 20", title, body, stretch=True)


def before_after(before: float, after: float, title: str) -> Markup:
    """Two shares of 1, one bar above the other: without and with weights."""
    body = (
        f'<rect class="before" x="0" y="2" width="{max(_at(before), 2):.1f}" height="7"/>'
        f'<rect class="after" x="0" y="11" width="{max(_at(after), 2):.1f}" height="7"/>'
    )
    return _svg("pair", "0 0 1000 20", title, body, stretch=True)


def _at(share: float) -> float:
    return 1000.0 * min(1.0, max(0.0, share))


@dataclass(frozen=True)
class Dot:
    """A mean with its interval, one row of a dot chart."""

    label: str
    mean: float
    low: float
    high: float


def dot_rows(dots: Sequence[Dot], title: str) -> Markup:
    """Means as dots on intervals over one shared axis, a labelled row each; a dotted line is the first row's mean."""
    low, high = _nice_range([d.low for d in dots] + [d.mean for d in dots], [d.high for d in dots])
    base = 36 * len(dots) + 4

    def x(value: float) -> float:
        return 4.0 + 212.0 * (value - low) / (high - low)

    first = x(dots[0].mean)
    parts = [f'<line class="reference" x1="{first:.1f}" x2="{first:.1f}" y1="24" y2="{base}"/>']
    for row, dot in enumerate(dots):
        y = 36 * row + 26
        parts.append(
            f"<g><title>{escape(dot.label)}: {dot.mean:.3f} ({dot.low:.3f} to {dot.high:.3f})</title>"
            f'<text x="4" y="{y - 12}">{escape(dot.label)}</text>'
            f'<line class="interval" x1="{x(dot.low):.1f}" x2="{x(dot.high):.1f}" y1="{y}" y2="{y}"/>'
            f'<circle class="dot" cx="{x(dot.mean):.1f}" cy="{y}" r="4"/></g>'
        )
    parts.append(f'<line class="axis" x1="4" x2="216" y1="{base}" y2="{base}"/>')
    for value, anchor in ((low, "start"), (high, "end")):
        parts.append(f'<text x="{x(value):.1f}" y="{base + 15}" text-anchor="{anchor}">{value:.2f}</text>')
    return _svg("dots", f"0 0 220 {base + 20}", title, "".join(parts))


def _nice_range(lows: Sequence[float], highs: Sequence[float]) -> tuple[float, float]:
    """An axis in twentieths that holds all values and is never empty."""
    low, high = math.floor(min(lows) * 20) / 20, math.ceil(max(highs) * 20) / 20
    return (low, high) if high - low >= 0.1 else (low - 0.05, high + 0.05)


def loss_curve(steps: Sequence[float], losses: Sequence[float], title: str) -> Markup:
    """A loss over steps on a log scale (values are positive), thinned to at most 400 points."""
    points = [(s, v) for s, v in zip(steps, losses, strict=True) if v > 0 and math.isfinite(v)]
    points = points[:: max(1, len(points) // 400)]
    if len(points) < 2:
        return Markup("")
    low, high = min(v for _, v in points), max(v for _, v in points)
    top, bottom = math.log(high if high > low else low * 1.1), math.log(low)
    first, last = points[0][0], points[-1][0]

    def place(step: float, value: float) -> str:
        x = 36 + 182 * (step - first) / max(last - first, 1e-9)
        return f"{x:.1f},{8 + 84 * (top - math.log(value)) / (top - bottom):.1f}"

    body = (
        '<line class="axis" x1="36" x2="218" y1="96" y2="96"/>'
        f'<polyline class="curve" points="{" ".join(place(s, v) for s, v in points)}"/>'
        f'<text x="31" y="12" text-anchor="end">{high:.3g}</text><text x="31" y="95" text-anchor="end">{low:.3g}</text>'
        f'<text x="36" y="111">{first:,.0f}</text><text x="218" y="111" text-anchor="end">{last:,.0f}</text>'
        '<text x="127" y="111" text-anchor="middle">step</text>'
    )
    return _svg("losses", "0 0 220 116", title, body)


def scaling_curve(nodes: Sequence[int], rates: Sequence[float], title: str) -> Markup:
    """Samples per second over nodes as dots on a curve; the dotted line is what each node would add if it added as
    much as each of the first run's."""
    if not nodes:
        return Markup("")
    most = max(nodes)
    ideal = [rates[0] / nodes[0] * count for count in (0, most)]
    top = max([*rates, ideal[1]]) or 1.0

    def place(count: float, rate: float) -> tuple[float, float]:
        return 36 + 182 * count / most, 92 - 84 * rate / top

    (x1, y1), (x2, y2) = place(0, ideal[0]), place(most, ideal[1])
    points = [place(count, rate) for count, rate in zip(nodes, rates, strict=True)]
    body = (
        '<line class="axis" x1="36" x2="218" y1="92" y2="92"/>'
        f'<line class="reference" x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}"/>'
        f'<polyline class="curve" points="{" ".join(f"{x:.1f},{y:.1f}" for x, y in points)}"/>'
    )
    for count, rate, (x, y) in zip(nodes, rates, points, strict=True):
        body += (
            f'<circle class="dot" cx="{x:.1f}" cy="{y:.1f}" r="3.5"><title>{count}: {rate:.1f} per second</title>'
            f'</circle><text x="{x:.1f}" y="107" text-anchor="middle">{count}</text>'
        )
    body += f'<text x="31" y="12" text-anchor="end">{top:.3g}</text><text x="31" y="95" text-anchor="end">0</text>'
    return _svg("losses", "0 0 220 112", title, body)


def histogram(values: Sequence[float], theta: float | None, title: str, bins: int = 20) -> Markup:
    """How many of some shares of 1 lie in each of equal bins; the dotted line is the share that is asked for."""
    if not values:
        return Markup("")
    counts = [0] * bins
    for value in values:
        counts[min(bins - 1, max(0, int(value * bins)))] += 1
    top, width = max(counts), 182 / bins
    body = '<line class="axis" x1="36" x2="218" y1="92" y2="92"/>'
    for number, count in enumerate(counts):
        height = 84 * count / top
        body += (
            f'<rect class="fill" x="{36 + number * width + 0.5:.1f}" y="{92 - height:.1f}" width="{width - 1:.1f}" '
            f'height="{height:.1f}"><title>{number / bins:.2f} to {(number + 1) / bins:.2f}: {count}</title></rect>'
        )
    if theta is not None:
        x = 36 + 182 * theta
        body += f'<line class="reference" x1="{x:.1f}" y1="4" x2="{x:.1f}" y2="92"/>'
    body += (
        f'<text x="31" y="12" text-anchor="end">{top}</text><text x="31" y="95" text-anchor="end">0</text>'
        '<text x="36" y="107">0</text><text x="127" y="107" text-anchor="middle">IoU</text>'
        '<text x="218" y="107" text-anchor="end">1</text>'
    )
    return _svg("losses", "0 0 220 112", title, body)


def _svg(kind: str, view_box: str, title: str, body: str, stretch: bool = False) -> Markup:
    fit = ' preserveAspectRatio="none"' if stretch else ""
    return Markup(
        f'<svg class="chart {kind}" viewBox="{view_box}"{fit} role="img" aria-label="{escape(title)}">{body}</svg>'
    )
