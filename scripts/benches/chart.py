"""A chart of a comparison as SVG: one bar a case, how many times the speed of the fastest peer cowfs has."""

import math
from collections.abc import Callable, Sequence
from html import escape

from figures import BEST, Result

WIDTH = 860
#: pixels: of the names, of a bar, from one bar to the next
NAMES, BAR, STEP = 250, 12, 18
TOP, RIGHT = 64, 70
GOOD, BAD, INK, FAINT, MARK = "#2a7f62", "#c0563c", "#222222", "#d8d8d8", "#1f4e9c"


def draw(results: Sequence[Result], caption: str) -> str:
    """Return the document. Cases without a peer, or in which less is better, are left out."""
    shown = [(result, ratio) for result in results if (ratio := result.ratio(BEST)) is not None]
    shown = [(result, ratio) for result, ratio in shown if result.unit != "MiB"]
    floors = [floor for result, _ in shown if (floor := result.ratio("floor")) is not None]
    values = [1.0, *(ratio for _, ratio in shown), *floors]
    low, high = 2.0 ** math.floor(math.log2(min(values))), 2.0 ** math.ceil(math.log2(max(values) * 1.01))

    def place(value: float) -> float:
        return NAMES + (WIDTH - NAMES - RIGHT) * math.log(value / low) / math.log(high / low)

    height = TOP + STEP * (len(shown) + len({_suite(result) for result, _ in shown})) + 30
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{height}" viewBox="0 0 {WIDTH} {height}"'
        ' font-family="sans-serif" font-size="12">',
        f"<title>{escape(caption)}</title>",
        f'<rect width="{WIDTH}" height="{height}" fill="#ffffff"/>',
        _text(10, 20, "Speed of cowfs, as a multiple of the fastest QEMU peer's", bold=True),
        _text(10, 38, caption, size=11),
    ]
    tick = low
    while tick <= high:
        x = place(tick)
        parts.append(_line(x, TOP - 8, height - 26, INK if tick == 1 else FAINT))
        parts.append(_text(x, height - 12, f"{tick:g}×", anchor="middle", size=11))
        tick *= 2
    y, suite = TOP, ""
    for result, ratio in shown:
        if _suite(result) != suite:
            suite = _suite(result)
            parts.append(_text(10, y + BAR - 2, suite, bold=True))
            y += STEP
        parts += _bar(result, ratio, y, place(1.0), place)
        y += STEP
    parts.append(_text(WIDTH - 10, 38, "| C passthrough = 1 (floor of FUSE)", anchor="end", size=11, fill=MARK))
    return "\n".join([*parts, "</svg>"]) + "\n"


def _suite(result: Result) -> str:
    return result.case.partition("/")[0]


def _bar(result: Result, ratio: float, y: float, one: float, place: Callable[[float], float]) -> list[str]:
    x = place(ratio)
    color = GOOD if ratio >= 1 else BAD
    name = result.case.partition("/")[2]
    parts = [
        _text(NAMES - 8, y + BAR - 2, name, anchor="end"),
        f'<rect x="{min(x, one):.1f}" y="{y}" width="{max(abs(x - one), 1):.1f}" height="{BAR}" fill="{color}">'
        f"<title>{escape(result.case)}: {ratio:.2f}</title></rect>",
        _text(WIDTH - RIGHT + 8, y + BAR - 2, f"{ratio:.2f}×"),
    ]
    floor = result.ratio("floor")
    if floor is not None:
        mark = place(floor)
        parts.append(
            f'<rect x="{mark - 1:.1f}" y="{y - 2}" width="3" height="{BAR + 4}" fill="{MARK}">'
            f"<title>{floor:.2f} of the C passthrough</title></rect>"
        )
    return parts


def _line(x: float, top: float, bottom: float, color: str) -> str:
    return f'<line x1="{x:.1f}" y1="{top}" x2="{x:.1f}" y2="{bottom}" stroke="{color}"/>'


def _text(
    x: float, y: float, text: str, *, anchor: str = "start", bold: bool = False, size: int = 12, fill: str = INK
) -> str:
    weight = ' font-weight="bold"' if bold else ""
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" font-size="{size}" fill="{fill}"{weight}>'
        f"{escape(text)}</text>"
    )
