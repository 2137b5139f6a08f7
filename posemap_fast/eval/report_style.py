"""The look of the report page."""

from __future__ import annotations

__all__ = ["CSS"]

CSS = """
body { margin: 0; background: #f4f5f7; color: #1f2933; }
body { font: 15px/1.5 system-ui, -apple-system, "Segoe UI", sans-serif; }
main { max-width: 1080px; margin: 0 auto; padding: 24px 20px 60px; }
header h1 { margin: 0 0 6px; font-size: 30px; }
.facts { display: flex; flex-wrap: wrap; gap: 4px 22px; color: #52606d; }
.facts b { font-weight: 600; color: #1f2933; }
.note { margin: 10px 0 0; padding: 8px 12px; background: #fff7e0; border-left: 3px solid #d97706; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(170px, 1fr)); gap: 12px; margin: 20px 0; }
.tile { background: #fff; border-radius: 8px; padding: 14px 16px; color: #52606d; font-size: 13px; }
.tile .value { font-size: 25px; font-weight: 650; color: #1d4ed8; font-variant-numeric: tabular-nums; }
.tile small { font-size: 13px; font-weight: 400; color: #52606d; }
section { background: #fff; border-radius: 8px; padding: 18px 20px; margin: 0 0 16px; overflow-x: auto; }
h2 { margin: 0 0 12px; font-size: 19px; }
h3 { margin: 14px 0 6px; font-size: 15px; color: #52606d; font-weight: 600; }
.hint { margin: 6px 0; color: #7b8794; font-size: 13px; }
table { border-collapse: collapse; width: 100%; font-size: 14px; }
th { text-align: left; font-weight: 600; }
th small { display: block; font-weight: 400; color: #7b8794; font-size: 12px; }
td, th { padding: 6px 10px; border-bottom: 1px solid #e6e8eb; }
thead th { color: #52606d; font-size: 12.5px; vertical-align: bottom; }
.results thead th:not(:first-child), td.n { text-align: right; }
td.n { font-variant-numeric: tabular-nums; white-space: nowrap; }
tr.baseline { color: #616e7c; }
tr.ours { background: #f0f5ff; }
tr.ours td { font-weight: 600; }
.times th { width: 30%; } .times td.n { width: 12%; }
.facts-table th { width: 30%; color: #52606d; }
.bar { height: 10px; background: #60a5fa; border-radius: 3px; }
.row { display: flex; gap: 10px; margin: 0 0 10px; }
figure { margin: 0; flex: 1 1 0; max-width: 320px; min-width: 120px; }
figure img { width: 100%; border-radius: 4px; display: block; }
figure img.cells { image-rendering: pixelated; }
figcaption { font-size: 12.5px; color: #616e7c; overflow-wrap: anywhere; }
.plot { max-width: 100%; display: block; margin: 4px 0; }
"""
