"""Is it faster? Two result sets of one machine, provider by provider: FAST, SLOW, SAME or AMBIGUOUS, by interval."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import median
from typing import NamedTuple

from .harness import approximate, difference
from .rows import Row, latest, machine_id, row_key

CONFIDENCE = 0.95
FEWEST = 6  # samples whose extremes enclose the median with that confidence
NOTABLE = 0.02  # a difference below which nothing is called faster or slower
ALIKE = 0.05  # the intervals of what is the same lie within this of one another


class Verdict(NamedTuple):
    """What became of one provider on one problem; `factor` is after over before, of the medians."""

    verdict: str
    reason: str
    provider: str
    problem: str
    factor: float | None


def interval(raw: Sequence[float]) -> tuple[float, float]:
    """The confidence interval of the median by order statistics, at least 95 % of six values or more; fewer cannot
    reach it.

    The k-th smallest and k-th largest of n values enclose the median with probability 1 - 2·P(Binomial(n, 1/2) < k).
    Source: David & Nagaraja, Order Statistics, section 7.1.
    """
    values, n, below = sorted(raw), len(raw), 0.0
    k = 0
    for i in range(n // 2):
        below += math.comb(n, i) / 2**n
        if 1 - 2 * below < CONFIDENCE:
            break
        k = i
    return values[k], values[n - 1 - k]


def compare(before: Sequence[Row], after: Sequence[Row]) -> list[Verdict]:
    """A verdict for each provider that either set has, by the last run of each problem.

    FAST and SLOW: the intervals do not meet, the medians differ by 2 % or more, and so they do in cycles where both
    rows have clocks, and beside the base of the same run, sample by sample: what slows a whole machine slows the base
    as well. SAME: all of either interval lies within 5 % of the other, or the samples are the same. AMBIGUOUS: anything
    else, fewer than six samples, rows that were disturbed, and rows of different machines. WRONG: no parity, or failed.
    GONE, NEW: in one set only.
    """
    old, new = ({(*row_key(r), r["provider"]): r for r in latest(rows) if "provider" in r} for rows in (before, after))
    found = []
    for key in dict.fromkeys([*old, *new]):
        a, b = old.get(key), new.get(key)
        if not any(r and ("raw_s" in r or "failed" in r) for r in (a, b)):
            continue  # absent in both
        verdict, reason, factor = _judge(a, b)
        if verdict in ("FAST", "SLOW") and a and b:
            verdict, reason = _beside(verdict, a, b, *(_base(key, rows) for rows in (old, new)))
        found.append(Verdict(verdict, reason, key[-1], " ".join(str(k) for k in key[:-1] if k is not None), factor))
    return found


def _judge(a: Row | None, b: Row | None) -> tuple[str, str, float | None]:
    if b is not None and "failed" in b:
        return "WRONG", b["failed"], None
    if b is not None and b.get("parity") and not b["parity"]["ok"] and not approximate(b):
        return "WRONG", difference(b), None
    if b is None or "absent" in b or "raw_s" not in b:
        return "GONE", b["absent"] if b and "absent" in b else "no row", None
    if a is None or "raw_s" not in a:
        return "NEW", "no figure before", None
    factor = b["median_s"] / a["median_s"]
    if machine_id(a["env"]) != machine_id(b["env"]):
        return "AMBIGUOUS", f"another machine: {machine_id(a['env'])} before, {machine_id(b['env'])} now", factor
    if a["raw_s"] == b["raw_s"]:
        return "SAME", "the same samples", factor
    if min(a["n"], b["n"]) < FEWEST:
        return "AMBIGUOUS", f"n below {FEWEST}", factor
    for r, when in ((a, "before"), (b, "now")):
        if disturbed := [text for text in r.get("remarks", []) if not text.startswith("spread")]:
            return "AMBIGUOUS", f"{when}: {', '.join(disturbed)}", factor
    verdict = _verdict(interval(a["raw_s"]), interval(b["raw_s"]), factor)
    if verdict in ("FAST", "SLOW") and a.get("clock_mhz") and b.get("clock_mhz"):
        clocks = [r["clock_mhz"]["median"] for r in (a, b)]
        before, after = ([s * mhz for s in interval(r["raw_s"])] for r, mhz in zip((a, b), clocks, strict=True))
        if _verdict(before, after, factor * clocks[1] / clocks[0]) != verdict:
            return "AMBIGUOUS", "in seconds, but not in cycles of the clock", factor
    return verdict, "", factor


def _base(key: tuple[object, ...], rows: dict[tuple[object, ...], Row]) -> Row | None:
    """The row that the speed-ups of a row's problem are over."""
    over = (rows[key].get("speedup") or {}).get("over")
    found = rows.get((*key[:-1], over))
    return found if found and "raw_s" in found else None


def _beside(verdict: str, a: Row, b: Row, base_a: Row | None, base_b: Row | None) -> tuple[str, str]:
    """The verdict, if it holds of the samples over those of the base in the same round."""
    if base_a is None or base_b is None or a["provider"] == base_a["provider"]:
        return "AMBIGUOUS", "in seconds; nothing beside it tells the machine from the program"
    ratios = [
        [s / t for s, t in zip(r["raw_s"], base["raw_s"], strict=False)] for r, base in ((a, base_a), (b, base_b))
    ]
    if _verdict(interval(ratios[0]), interval(ratios[1]), median(ratios[1]) / median(ratios[0])) != verdict:
        return "AMBIGUOUS", f"in seconds, but not beside {base_a['provider']} of the same run"
    return verdict, ""


def _verdict(a: Sequence[float], b: Sequence[float], factor: float) -> str:
    if b[1] < a[0] and factor < 1 - NOTABLE:
        return "FAST"
    if b[0] > a[1] and factor > 1 + NOTABLE:
        return "SLOW"
    return "SAME" if max(b[1] / a[0], a[1] / b[0]) <= 1 + ALIKE else "AMBIGUOUS"


def bad(verdicts: Sequence[Verdict]) -> bool:
    """Whether the exit code should say so: something is slower, wrong, gone, or of another machine."""
    return any(v.verdict in ("SLOW", "WRONG", "GONE") or v.reason.startswith("another machine") for v in verdicts)


def verdict_table(verdicts: Sequence[Verdict]) -> str:
    """A Markdown table, a line for each verdict."""
    lines = ["| verdict | problem | provider | after / before | |", "|---|---|---|---:|---|"]
    lines += [
        f"| {v.verdict} | {v.problem} | {v.provider} | {'' if v.factor is None else f'{v.factor:.3f}'} | {v.reason} |"
        for v in verdicts
    ]
    return "\n".join(lines)
