"""The report's frame: its style sheet, light and dark, and what its measures are called."""

from __future__ import annotations

LOWER, HIGHER = "lower is better", "higher is better"

DESCRIPTIONS: dict[str, tuple[str, str, str]] = {
    "caption_loss": ("Caption loss", "nats per token", LOWER),
    "caption_loss_per_character": ("Caption loss", "nats per character", LOWER),
    "caption_token_accuracy": ("Tokens predicted right", "share", HIGHER),
    "exact_match": ("Exact match", "share", HIGHER),
    "character_error_rate": ("Character error rate", "edits per character", LOWER),
    "naming_rank": ("Rank of the right name", "", LOWER),
    "naming_top1": ("Right name ranked first", "share", HIGHER),
    "naming_reciprocal_rank": ("Reciprocal rank", "mean", HIGHER),
    "naming_candidates": ("Names to choose from", "mean", ""),
    "psnr": ("PSNR", "dB", HIGHER),
    "ssim": ("SSIM", "", HIGHER),
    "l1": ("Mean absolute difference", "of 2", LOWER),
    "codebook_usage": ("Codes in use", "share of K", HIGHER),
    "index_perplexity": ("Perplexity of the indices", "codes", HIGHER),
}
"""Metric or loss term -> (what people call it, unit, which way is better)."""

_STYLE = """
:root { color-scheme: light dark; --ground: #fdfdfc; --raised: #f3f3f0; --ink: #1b1c1e; --faint: #5d6066;
  --line: #d9d9d4; --s0: #0b57c4; --s1: #b2410c; --s2: #1d7a4a; --s3: #7a3fae; }
@media (prefers-color-scheme: dark) { :root { --ground: #16181b; --raised: #1f2226; --ink: #e8e8e6; --faint: #a2a6ad;
  --line: #363a40; --s0: #7fb0ff; --s1: #ff9d66; --s2: #6fd39c; --s3: #cba3f5; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--ground); color: var(--ink); font: 16px/1.5 system-ui, sans-serif; }
main { max-width: 1160px; margin: 0 auto; padding: 24px 16px 64px; }
h1 { font-size: 1.7rem; line-height: 1.2; margin: 0; overflow-wrap: anywhere; }
h2 { font-size: 1.25rem; margin: 40px 0 8px; padding-top: 16px; border-top: 1px solid var(--line); }
h3 { font-size: 1rem; margin: 20px 0 8px; overflow-wrap: anywhere; }
h4 { font-size: .9rem; margin: 8px 0; }
p { margin: 8px 0; max-width: 70ch; }
header p, .unit, dt { color: var(--faint); }
.unit { font-size: .85em; font-weight: normal; }
dl { display: flex; flex-wrap: wrap; gap: 8px 32px; margin: 12px 0 16px; }
dt { font-size: .8rem; } dd { margin: 0; overflow-wrap: anywhere; }
.scroll { overflow-x: auto; margin: 8px 0; }
table { border-collapse: collapse; font-size: .9rem; width: 100%; }
th, td { text-align: left; vertical-align: top; padding: 6px 14px 6px 0; border-bottom: 1px solid var(--line); }
th { font-weight: 600; white-space: nowrap; }
td { overflow-wrap: anywhere; min-width: 8.5em; }
td.num { min-width: 0; }
.pair table { table-layout: fixed; }
.num { text-align: right; white-space: nowrap; font-variant-numeric: tabular-nums; }
.pair { display: grid; gap: 8px 32px; grid-template-columns: repeat(auto-fit, minmax(min(100%, 420px), 1fr)); }
.charts { display: grid; gap: 16px 24px; grid-template-columns: repeat(auto-fill, minmax(min(100%, 330px), 1fr)); }
figure { margin: 0; min-width: 0; }
.chart figcaption { font-size: .9rem; font-weight: 600; }
.chart > svg { display: block; width: 100%; height: auto; }
svg text { fill: var(--faint); font: 11px system-ui, sans-serif; }
.end { text-anchor: end; } .mid { text-anchor: middle; }
.grid { stroke: var(--line); stroke-width: 1; } .axis { stroke: var(--faint); fill: none; stroke-width: 1; }
polyline { fill: none; stroke-width: 1.8; stroke-linejoin: round; }
polyline.s0 { stroke: var(--s0); } polyline.s1 { stroke: var(--s1); }
polyline.s2 { stroke: var(--s2); } polyline.s3 { stroke: var(--s3); }
circle.s0 { fill: var(--s0); } circle.s1 { fill: var(--s1); }
circle.s2 { fill: var(--s2); } circle.s3 { fill: var(--s3); }
.legend { display: flex; flex-wrap: wrap; gap: 2px 16px; margin: 2px 0 0; padding: 0;
  list-style: none; font-size: .8rem; }
.swatch { width: 26px; height: 8px; margin-right: 6px; vertical-align: middle; }
.pictures { display: grid; gap: 16px; grid-template-columns: repeat(auto-fill, minmax(min(100%, 260px), 1fr)); }
.picture > div { display: grid; grid-template-columns: 1fr 1fr; gap: 4px; align-items: start; }
.picture img { width: 100%; image-rendering: pixelated; border: 1px solid var(--line); background: #fff; }
.picture figcaption { font-size: .85rem; overflow-wrap: anywhere; }
pre { overflow-x: auto; background: var(--raised); padding: 12px; font-size: .8rem; line-height: 1.4; }
summary { cursor: pointer; padding: 6px 0; }
"""


def page(name: str, body: str) -> str:
    """A whole HTML document around `body`; both are ready HTML."""
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{name}: report</title><style>{_STYLE}</style></head><body><main>"
        f"<header><h1>{name}</h1><p>End-to-end vision tokenizer tuning: a run and what came out of it.</p></header>"
        f"{body}</main></body></html>\n"
    )
