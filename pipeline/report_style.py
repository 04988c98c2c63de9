"""The looks of the report: its colours in light and in dark, and its style sheet."""

from __future__ import annotations

__all__ = ["DARK", "LIGHT", "style_sheet"]

# Each colour once: in an SVG of ours it becomes a variable of the page, by its name here.
LIGHT = {
    "page": "#f5f6f8",
    "surface": "#fefefe",
    "ink": "#1b2330",
    "muted": "#68737f",
    "grid": "#e4e8ed",
    "sttn": "#1f6feb",
    "persistence": "#d97b1d",
    "weekly-average": "#8a5fc9",
    "outage": "#99a3b0",
}
DARK = {
    "page": "#0e1217",
    "surface": "#171d24",
    "ink": "#e6eaef",
    "muted": "#93a0ad",
    "grid": "#2a323c",
    "sttn": "#5aa2ff",
    "persistence": "#f0a04b",
    "weekly-average": "#b592ee",
    "outage": "#5d6875",
}

_RULES = """\
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink); font: 16px/1.55 var(--font); }
main { max-width: 1160px; margin: 0 auto; padding: 40px 24px 80px; }
header p { max-width: 46em; color: var(--muted); margin: 0; }
header .brand { color: var(--sttn); font-weight: 650; letter-spacing: .02em; }
h1 { font-size: clamp(28px, 4vw, 40px); line-height: 1.15; letter-spacing: -.02em; margin: 4px 0 12px; }
h2 { font-size: 21px; letter-spacing: -.01em; margin: 52px 0 6px; }
.note { max-width: 52em; color: var(--muted); margin: 0 0 16px; font-size: 15px; }
.card { background: var(--surface); border: 1px solid var(--grid); border-radius: 12px; padding: 18px; margin: 0; }
.kpis { display: grid; grid-template-columns: repeat(auto-fit, minmax(160px, 1fr)); gap: 12px; margin-top: 28px; }
.kpi { display: flex; flex-direction: column; }
.kpi b { font-size: 29px; line-height: 1.2; letter-spacing: -.02em; font-variant-numeric: tabular-nums; }
.kpi small { font-size: 15px; font-weight: 500; color: var(--muted); letter-spacing: 0; }
.kpi span { font-size: 14px; }
.kpi i { font-style: normal; font-size: 13px; color: var(--muted); }
svg { display: block; width: 100%; height: auto; }
.wide { overflow-x: auto; }
figure .wide svg { min-width: 760px; }
table { border-collapse: collapse; width: 100%; font-size: 15px; font-variant-numeric: tabular-nums; }
th { font-weight: 500; color: var(--muted); text-align: right; }
td { text-align: right; }
th, td { padding: 7px 10px; }
tbody tr { border-top: 1px solid var(--grid); }
tbody th { text-align: left; color: var(--ink); white-space: nowrap; }
.errors { min-width: 720px; }
.errors thead tr:first-child th { text-align: center; color: var(--ink); font-weight: 600; padding-bottom: 0; }
.errors td:nth-child(3n+2) { padding-left: 26px; }
.model::before {
  content: ""; display: inline-block; width: 10px; height: 10px; border-radius: 50%;
  background: var(--dot); margin-right: 9px;
}
.best { font-weight: 700; color: var(--sttn); }
.places {
  display: grid; grid-template-columns: minmax(0, 2.1fr) minmax(250px, 1fr); gap: 16px; margin-top: 16px;
}
@media (max-width: 820px) { .places { grid-template-columns: 1fr; } }
.places figure { display: flex; align-items: center; }
.sensors { font-size: 14px; }
.sensors th, .sensors td { padding: 4px 6px; }
.sensors caption { text-align: left; font-weight: 600; padding-bottom: 8px; }
.sensors .group { color: var(--muted); font-size: 13px; padding-top: 12px; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: 6px 24px; margin: 0; font-size: 15px; }
dt { color: var(--muted); }
dd { margin: 0; }
details { margin-top: 16px; font-size: 15px; }
summary { cursor: pointer; color: var(--muted); }
pre { overflow-x: auto; font-size: 13px; line-height: 1.5; background: var(--page); border-radius: 8px; padding: 14px; }
code { font-size: 13.5px; }
"""


def style_sheet() -> str:
    """CSS for a page of cards, tables and pictures; dark where the reader's system is."""
    font = 'Inter, system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", "DejaVu Sans", sans-serif'
    return (
        f":root {{ color-scheme: light dark; --font: {font}; {_variables(LIGHT)} }}\n"
        f"@media (prefers-color-scheme: dark) {{ :root {{ {_variables(DARK)} }} }}\n{_RULES}"
    )


def _variables(colours: dict[str, str]) -> str:
    return " ".join(f"--{name}: {value};" for name, value in colours.items())
