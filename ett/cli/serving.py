"""The command that answers over HTTP."""

from __future__ import annotations

import argparse
import os
import sys
from dataclasses import fields
from pathlib import Path

from ett.cli.common import Add, add_device, positive, quiet_libraries
from ett.errors import UserError
from ett.serve.limits import Limits

KEY_VARIABLE = "ETT_API_KEY"
INSTALL = 'pip install "ett-tuning[serve]"'
_PARTS = ("fastapi", "uvicorn", "prometheus_client")
_LIMITS = {
    "max_requests": "requests in flight at a time",
    "max_batch": "requests answered together",
    "max_body": "bytes of a request",
    "max_pixels": "pixels of a picture",
    "max_images": "pictures in a request, read or drawn",
    "max_characters": "characters of text in a request",
    "max_new_tokens": "tokens of an answer",
    "seconds": "that a request may take",
    "body_seconds": "that its body may take to arrive",
}


def register(add: Add) -> None:
    """This command."""
    sub = add(
        "serve",
        _serve,
        "answer over HTTP in OpenAI's shapes, with a page (docs/serving.md)",
        "ett serve runs/mine --port 8000",
    )
    sub.add_argument("model", metavar="MODEL", help="a run, a saved model or tokenizer, or a shipped name")
    sub.add_argument("--name", help="the model's for clients (default: its folder's)")
    sub.add_argument("--initial", metavar="MODEL", help="model or tokenizer before tuning, for the page's comparison")
    sub.add_argument(
        "--run", metavar="DIR", type=Path, help="a run or a comparison whose report the page shows, while it trains too"
    )
    sub.add_argument(
        "--host", default="127.0.0.1", help="address to listen at (default: %(default)s, this machine alone)"
    )
    sub.add_argument("--port", type=_port, default=8000, help="default: %(default)s; 0 takes a free one")
    sub.add_argument(
        "--allow-host",
        metavar="NAME",
        action="append",
        default=[],
        help="a name that requests may use, as a proxy sends it",
    )
    sub.add_argument(
        "--api-key-file",
        metavar="FILE",
        type=Path,
        help=f"API keys, one a line, of which requests must bring one; {KEY_VARIABLE} in the environment is another",
    )
    add_device(sub)
    sub.add_argument("--access-log", action="store_true", help="a line for each request")
    limits = sub.add_argument_group("limits")
    for each in fields(Limits):
        limits.add_argument(
            f"--{each.name.replace('_', '-')}",
            metavar="N",
            type=positive,
            default=each.default,
            help=f"{_LIMITS[each.name]} (default: %(default)s)",
        )


def _port(text: str) -> int:
    number = int(text)
    if not 0 <= number < 2**16:
        raise argparse.ArgumentTypeError(f"{text} is not from 0 to 65535")
    return number


def _serve(arguments: argparse.Namespace) -> int:
    _check_installed()
    from ett.serve.app import create_app
    from ett.serve.run_report import RunReport
    from ett.serve.served import load_served
    from ett.serve.server import address, bind, host_names, is_loopback, read_keys, serve

    quiet_libraries()
    keys = read_keys(arguments.api_key_file, os.environ.get(KEY_VARIABLE))
    limits = Limits(**{each.name: getattr(arguments, each.name) for each in fields(Limits)})
    run = RunReport(arguments.run) if arguments.run else None
    bound = bind(arguments.host, arguments.port)
    with bound:
        served = load_served(arguments.model, arguments.initial, arguments.name, arguments.device)
        app = create_app(served, limits, keys=keys, hosts=host_names(bound, arguments.allow_host), run=run)
        if not is_loopback(bound) and not keys:
            print(
                f"ett: warning: {address(bound)} can be reached by others, and no API key is asked for (--api-key-file).",
                file=sys.stderr,
            )
        print(f"{served.name}: {address(bound)}/ (page), {address(bound)}/v1 (OpenAI clients)", flush=True)
        serve(app, bound, limits, access_log=arguments.access_log)
    return 0


def _check_installed() -> None:
    """Raise UserError where a part of the extra is missing."""
    from importlib.util import find_spec

    missing = [name for name in _PARTS if find_spec(name) is None]
    if missing:
        raise UserError(f"ett serve needs {', '.join(missing)}: {INSTALL}")
