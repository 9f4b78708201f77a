"""Curves over time as plain shapes, for a template to draw."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC

from hq_backups.cards import LABELS, duration
from hq_backups.engine.space import human_bytes
from hq_backups.history import Point

WIDTH, HEIGHT = 320, 96
LEFT, RIGHT, TOP, BOTTOM = 4, 4, 16, 16
"""Room for the words around the curve."""


@dataclass(frozen=True)
class Dot:
    """One backup on a curve."""

    x: float
    y: float

    @property
    def cx(self) -> str:
        """Return where it lies, without the commas that a locale would put in."""
        return f"{self.x:.1f}"

    @property
    def cy(self) -> str:
        """Return how high it lies."""
        return f"{self.y:.1f}"


@dataclass(frozen=True)
class Chart:
    """A curve, its scale and the same in words."""

    id: str
    title: str
    words: str
    dots: tuple[Dot, ...]
    highest: str
    first: str
    last: str
    width: int = WIDTH
    height: int = HEIGHT

    @property
    def line(self) -> str:
        """Return the polyline's points."""
        return " ".join(f"{dot.cx},{dot.cy}" for dot in self.dots)

    @property
    def floor(self) -> int:
        """Return where zero lies."""
        return HEIGHT - BOTTOM

    @property
    def right(self) -> int:
        """Return where the curve ends."""
        return WIDTH - RIGHT


def charts(curves: Mapping[tuple[str, str], Sequence[Point]]) -> list[Chart]:
    """Return the curves of each store's sizes and durations; none where there are no two backups to compare."""
    drawn = []
    for number, ((store, host), points) in enumerate(curves.items()):
        about = f"{LABELS.get(store, store)} backups on {host}"
        sizes = [(point, float(point.size)) for point in points if point.size is not None]
        times = [(point, point.seconds) for point in points if point.seconds is not None]
        drawn.append(_chart(f"hqb-{number}-size", f"Size of {about}", sizes, human_bytes))
        drawn.append(_chart(f"hqb-{number}-time", f"Duration of {about}", times, duration))
    return [chart for chart in drawn if chart is not None]


def _chart(
    id: str, title: str, values: Sequence[tuple[Point, float]], show: Callable[[float], str]
) -> Chart | None:
    if len(values) < 2:
        return None
    first, last = values[0][0].at, values[-1][0].at
    span = (last - first).total_seconds() or 1.0
    numbers = [value for _, value in values]
    highest = max(numbers) or 1.0
    wide, high = WIDTH - LEFT - RIGHT, HEIGHT - TOP - BOTTOM
    dots = tuple(
        Dot(
            LEFT + wide * (point.at - first).total_seconds() / span,
            TOP + high * (1 - max(value, 0.0) / highest),
        )
        for point, value in values
    )
    days = [f"{moment.astimezone(UTC):%Y-%m-%d}" for moment in (first, last)]
    words = (
        f"{len(values)} backups from {days[0]} to {days[1]}: the smallest {show(min(numbers))}, "
        f"the largest {show(max(numbers))}, the newest {show(numbers[-1])}."
    )
    if show is duration:
        words = words.replace("the smallest", "the shortest").replace("the largest", "the longest")
    return Chart(id, title, words, dots, show(max(numbers)), days[0], days[1])
