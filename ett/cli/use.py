"""Commands that use a model: chat about a picture, or take one through the tokenizer and back."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

from ett.cli.common import Add, add_device, add_model, positive, print_json, quiet_libraries


def register(add: Add) -> None:
    """These commands, in the order that the help shows them in."""
    sub = add("chat", _chat, "ask a model about a picture", 'ett chat runs/demo/ett cat.png "What is this?"')
    add_model(sub)
    sub.add_argument("image", metavar="IMAGE", type=Path)
    sub.add_argument("question", nargs="?", help="left out: the model describes the picture")
    sub.add_argument("--max-new-tokens", type=positive, default=128)
    add_device(sub)
    sub.add_argument("--json", action="store_true", help="print one JSON object instead of text")

    sub = add(
        "reconstruct",
        _reconstruct,
        "pictures through the tokenizer and back",
        "ett reconstruct runs/demo/ett a.png b.jpg --out reconstructions",
    )
    add_model(sub)
    sub.add_argument("images", metavar="IMAGE", type=Path, nargs="+")
    sub.add_argument("--out", metavar="DIR", type=Path, required=True)
    sub.add_argument(
        "--size", type=positive, help="side that pictures are fitted to [pixels]; default: the model's own"
    )
    add_device(sub)
    sub.add_argument("--compare", action="store_true", help="also write original and reconstruction side by side")
    sub.add_argument("--json", action="store_true", help="print one JSON array instead of lines")

    sub = add("tokenize", _tokenize, "a picture's codebook indices", "ett tokenize runs/demo/ett cat.png --json")
    add_model(sub)
    sub.add_argument("image", metavar="IMAGE", type=Path)
    sub.add_argument(
        "--size", type=positive, help="side that the picture is fitted to [pixels]; default: the model's own"
    )
    sub.add_argument("--json", action="store_true", help="print one JSON object instead of a grid")


def _chat(arguments: argparse.Namespace) -> int:
    from ett.devices import place
    from ett.errors import ModelError
    from ett.evaluate.run import load_for_evaluation
    from ett.experiments.run import resolve_model_folder
    from ett.generate.chat import answer
    from ett.images import load_image

    quiet_libraries()
    image = load_image(arguments.image)
    model, _, processor = load_for_evaluation(resolve_model_folder(arguments.model))
    if model is None:
        raise ModelError(
            f"{arguments.model} holds a vision tokenizer alone; chatting needs a model with a language model."
        )
    place(model, arguments.device)
    live = sys.stdout.isatty() and not arguments.json
    show: Callable[[str], None] | None = (lambda piece: print(piece, end="", flush=True)) if live else None
    text = answer(model, processor, [image], arguments.question, max_new_tokens=arguments.max_new_tokens, on_text=show)
    if arguments.json:
        asked = {"model": str(arguments.model), "image": str(arguments.image), "question": arguments.question}
        print_json({**asked, "answer": text})
    else:
        print("" if live else text)
    return 0


def _reconstruct(arguments: argparse.Namespace) -> int:
    from ett.devices import place
    from ett.evaluate.run import load_for_evaluation
    from ett.experiments.run import resolve_model_folder
    from ett.generate.reconstruct import write_reconstructions

    quiet_libraries()
    _, tokenizer, processor = load_for_evaluation(resolve_model_folder(arguments.model))
    place(tokenizer, arguments.device)
    size = arguments.size if arguments.size is not None else processor.image_processor
    written = write_reconstructions(tokenizer, size, arguments.images, arguments.out, compare=arguments.compare)
    if arguments.json:
        print_json(
            [
                {"path": str(path), "width": f.image.width, "height": f.image.height, "psnr": f.psnr, "ssim": f.ssim}
                for path, f in written
            ]
        )
        return 0
    for path, found in written:
        print(f"{path}  {found.image.width} x {found.image.height}  PSNR {found.psnr:.2f} dB  SSIM {found.ssim:.4f}")
    return 0


def _tokenize(arguments: argparse.Namespace) -> int:
    from ett.evaluate.run import load_for_evaluation
    from ett.experiments.run import resolve_model_folder
    from ett.generate.reconstruct import tokenize_picture

    quiet_libraries()
    _, tokenizer, processor = load_for_evaluation(resolve_model_folder(arguments.model))
    size = arguments.size if arguments.size is not None else processor.image_processor
    found = tokenize_picture(tokenizer, size, arguments.image)
    if arguments.json:
        print_json(found)
    else:
        width = len(str(found["codebook_size"] - 1))
        for row in found["indices"]:
            print(" ".join(f"{index:>{width}}" for index in row))
    return 0
