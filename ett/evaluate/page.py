"""The report's frame: its style sheet, light and dark, and what its measures are called."""

from __future__ import annotations

from ett.evaluate.answer_measures import LENGTHS

LOWER, HIGHER = "lower is better", "higher is better"

DESCRIPTIONS: dict[str, tuple[str, str, str]] = {
    "caption_loss": ("Caption loss", "nats per token", LOWER),
    "caption_loss_per_character": ("Caption loss", "nats per character", LOWER),
    "text_loss": ("Loss without pictures", "nats per token", LOWER),
    "text_loss_per_character": ("Loss without pictures", "nats per character", LOWER),
    "caption_token_accuracy": ("Tokens predicted right", "share", HIGHER),
    "exact_match": ("Exact match", "share", HIGHER),
    "character_error_rate": ("Character error rate", "edits per character", LOWER),
    "naming_rank": ("Rank of the right name", "", LOWER),
    "naming_top1": ("Right name ranked first", "share", HIGHER),
    "naming_reciprocal_rank": ("Reciprocal rank", "mean", HIGHER),
    "naming_candidates": ("Names to choose from", "mean", ""),
    "vqa_accuracy": ("VQA accuracy", "share", HIGHER),
    "anls": ("ANLS", "likeness of answers", HIGHER),
    "choice_accuracy": ("Right choice likeliest", "share", HIGHER),
    "choice_chance": ("Right choice by guessing", "share", ""),
    "letter_accuracy": ("Right choice named", "share", HIGHER),
    "letter_answered": ("Any choice named", "share", HIGHER),
    "yes_no_accuracy": ("Yes or no: accuracy", "share", HIGHER),
    "yes_no_precision": ("Yes or no: precision", "of yes", HIGHER),
    "yes_no_recall": ("Yes or no: recall", "of yes", HIGHER),
    "yes_no_f1": ("Yes or no: F1", "of yes", HIGHER),
    "yes_no_yes_ratio": ("Yes or no: answered yes", "share", ""),
    "yes_no_answered": ("Yes or no: answered either", "share", HIGHER),
    "reading_word_accuracy": ("Words read", "share", HIGHER),
    "reading_character_error_rate": ("Reading errors", "edits per character", LOWER),
    **{
        f"reading_character_error_rate_{name}": (
            f"Reading errors, texts of {name.replace('_', ' ')} characters",
            "edits per character",
            LOWER,
        )
        for name in LENGTHS
    },
    "caption_cider_d": ("CIDEr-D", "of 10", HIGHER),
    "caption_rouge_l": ("ROUGE-L", "", HIGHER),
    "caption_bleu_4": ("BLEU-4", "", HIGHER),
    "drawn_scenes_right": ("Scenes drawn right", "share", HIGHER),
    "drawn_top1": ("Drawings found by name, first", "share", HIGHER),
    "drawn_top5": ("Drawings found by name, among five", "share", HIGHER),
    "drawn_choice": ("Drawings told by name among ten", "share", HIGHER),
    "drawn_frechet_distance": ("EfficientNet-Lite0 Fréchet distance of drawings", "", LOWER),
    "drawn_kernel_distance": ("EfficientNet-Lite0 kernel distance of drawings", "", LOWER),
    "drawn_words_read": ("Drawn words read", "OCR, share", HIGHER),
    "drawn_reading_errors": ("Reading errors in drawn words", "OCR, edits per character", LOWER),
    **{
        f"drawn_{name}_of_reconstructions": (f"{title}: the pictures asked for, reconstructed", unit, "")
        for name, title, unit in (
            ("scenes_right", "Scenes right", "share"),
            ("top1", "Found by name, first", "share"),
            ("top5", "Found by name, among five", "share"),
            ("choice", "Told by name among ten", "share"),
            ("frechet_distance", "EfficientNet-Lite0 Fréchet distance", ""),
            ("kernel_distance", "EfficientNet-Lite0 kernel distance", ""),
            ("words_read", "Words read", "OCR, share"),
            ("reading_errors", "Reading errors", "OCR, edits per character"),
        )
    },
    "psnr": ("PSNR", "dB", HIGHER),
    "ssim": ("SSIM", "", HIGHER),
    "l1": ("Mean absolute difference", "of 2", LOWER),
    "lpips_vgg": ("LPIPS (VGG)", "", LOWER),
    "lite0_distance": ("EfficientNet-Lite0 distance", "", LOWER),
    "lite0_frechet_distance": ("EfficientNet-Lite0 Fréchet distance", "", LOWER),
    "ocr_character_error_rate": ("Reading errors after reconstruction", "OCR, edits per character", LOWER),
    "ocr_character_error_rate_of_originals": ("Reading errors before", "OCR, edits per character", ""),
    "codebook_usage": ("Codes in use", "share of K", HIGHER),
    "indices_changed": ("Tokens with another index than before tuning", "share", ""),
    "reconstruction_drift": ("Difference from the reconstruction before tuning", "of 2", ""),
    "index_perplexity": ("Perplexity of the indices", "codes", HIGHER),
}
"""Metric or loss term -> (what people call it, unit, which way is better)."""

_STYLE = """
:root { color-scheme: light dark; --ground: #fdfdfc; --raised: #f3f3f0; --ink: #1b1c1e; --faint: #5d6066;
  --line: #d9d9d4; --s0: #0b57c4; --s1: #b2410c; --s2: #1d7a4a; --s3: #7a3fae;
  --s4: #8a6a00; --s5: #a8326d; }
@media (prefers-color-scheme: dark) { :root { --ground: #16181b; --raised: #1f2226; --ink: #e8e8e6; --faint: #a2a6ad;
  --line: #363a40; --s0: #7fb0ff; --s1: #ff9d66; --s2: #6fd39c; --s3: #cba3f5;
  --s4: #e3c565; --s5: #f59ac4; } }
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
polyline { stroke-width: 1.8; stroke-linejoin: round; }
.s0 { stroke: var(--s0); fill: var(--s0); } .s1 { stroke: var(--s1); fill: var(--s1); }
.s2 { stroke: var(--s2); fill: var(--s2); } .s3 { stroke: var(--s3); fill: var(--s3); }
.s4 { stroke: var(--s4); fill: var(--s4); } .s5 { stroke: var(--s5); fill: var(--s5); }
polyline[class] { fill: none; }
.mark { stroke-width: 1; } .mark.hollow { fill: var(--ground); stroke-width: 1.3; }
.bar { stroke-width: 2; } .zero { stroke: var(--ink); stroke-width: 1.2; stroke-dasharray: 3 2; }
svg text.name { fill: var(--ink); font-weight: 600; }
.legend { display: flex; flex-wrap: wrap; gap: 2px 16px; margin: 2px 0 0; padding: 0;
  list-style: none; font-size: .8rem; }
.swatch { width: 30px; height: 8px; margin-right: 6px; vertical-align: middle; }
.pictures { display: grid; gap: 0 24px; grid-template-columns: repeat(auto-fill, minmax(min(100%, 330px), 1fr)); }
.pictures .compared { margin: 8px 0 16px; } .pictures figcaption { font-size: .85rem; }
pre { overflow-x: auto; background: var(--raised); padding: 12px; font-size: .8rem; line-height: 1.4; }
code { font-size: .9em; overflow-wrap: anywhere; } .arms code { overflow-wrap: break-word; }
summary { cursor: pointer; padding: 6px 0; }
ul.verdict { list-style: none; margin: 8px 0; padding: 0; }
.verdict li { margin: 8px 0; padding-left: 1.5em; text-indent: -1.5em; max-width: 80ch; }
.verdict .sign { display: inline-block; width: 1.5em; text-indent: 0; }
.better { color: var(--s2); } .worse { color: var(--s1); }
p.headline { font-size: 1.1rem; font-weight: 600; }
.cards { display: grid; gap: 8px 32px; grid-template-columns: repeat(auto-fit, minmax(min(100%, 320px), 1fr)); }
.arms { width: auto; min-width: 100%; border-collapse: separate; border-spacing: 0; }
.arms td { min-width: 5em; max-width: 34em; overflow-wrap: break-word; }
.arms th { white-space: normal; vertical-align: bottom; } .arms th.num { min-width: 6.2em; }
.arms td:first-child, .arms th:first-child { position: sticky; left: 0; background: var(--ground); min-width: 8.5em;
  width: 16em; max-width: 20em; }
.answers td { min-width: 7em; max-width: 18em; overflow-wrap: anywhere; }
.best { font-weight: 600; }
.thumbs { display: grid; gap: 6px 8px; grid-template-columns: repeat(auto-fill, minmax(92px, 1fr)); max-width: 1100px; }
.thumbs img { display: block; width: 100%; image-rendering: pixelated; border: 1px solid var(--line); background: #fff; }
.thumbs > div { display: flex; flex-direction: column; justify-content: flex-end; font-size: .8rem; line-height: 1.3; }
.compared { margin: 16px 0 24px; } .compared figcaption { overflow-wrap: anywhere; margin-bottom: 4px; }
aside { border: 1px solid var(--line); background: var(--raised); --ground: var(--raised); padding: 4px 16px 12px;
  margin: 40px 0 0; }
aside h2 { border: 0; margin-top: 8px; padding-top: 0; }
@media (min-width: 700px) { .thumbs { grid-template-columns: repeat(var(--columns), minmax(0, 150px)); } }
@media (max-width: 699px) { .arms td:first-child, .arms th:first-child { max-width: 8.5em; } th, td { padding-right: 10px; } }
"""


def page(name: str, body: str, about: str = "a run and what came out of it") -> str:
    """A whole HTML document around `body`; all are ready HTML."""
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{name}: report</title><style>{_STYLE}</style></head><body><main>"
        f"<header><h1>{name}</h1><p>End-to-end vision tokenizer tuning: {about}.</p></header>"
        f"{body}</main></body></html>\n"
    )
