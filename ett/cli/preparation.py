"""Commands that come before training: what it needs is fetched or checked ahead of time."""

from __future__ import annotations

import argparse

from ett.cli.common import Add, positive, print_json, quiet_libraries


def register(add: Add) -> None:
    """These commands, in the order that the help shows them in."""
    sub = add(
        "plan",
        _plan,
        "parameters, memory, operations and time of a recipe, before it runs (docs/plan.md)",
        "ett plan smollm2_64px arm=ett --hardware rtx4090 --world-size 2",
    )
    sub.add_argument("recipe", metavar="RECIPE", help="a YAML file, or the name of a shipped recipe")
    sub.add_argument("overrides", metavar="key=value", nargs="*", help="dotted override, for example arm=ett")
    sub.add_argument(
        "--hardware", metavar="NAME", default="cpu-2core", help="default: %(default)s; docs/plan.md lists them"
    )
    sub.add_argument("--world-size", metavar="N", type=positive, default=1, help="devices, one process each")
    sub.add_argument("--sharding", choices=["ddp", "fsdp"], help="default: the recipe's")
    sub.add_argument("--device-memory", metavar="SIZE", help="of one device, such as 24GiB (default: the hardware's)")
    sub.add_argument("--json", action="store_true", help="print one JSON object instead of tables")

    sub = add("prepare", _prepare, "fetch a language model into the cache ahead of time", "ett prepare smollm2")
    sub.add_argument("name", choices=["smollm2"])


def _plan(arguments: argparse.Namespace) -> int:
    from ett.experiments.plan import Target, as_text, as_values, find_hardware, parse_memory, plan, recipes_of

    quiet_libraries()
    memory = parse_memory(arguments.device_memory) if arguments.device_memory else None
    hardware = find_hardware(arguments.hardware)
    for i, recipe in enumerate(recipes_of(arguments.recipe, arguments.overrides)):
        sharding = arguments.sharding or recipe.sharding
        target = Target(arguments.hardware, hardware, arguments.world_size, sharding, memory)
        stages = plan(recipe, target)
        if arguments.json:
            print_json(as_values(recipe.name, stages, target))
        else:
            print("\n" * (i > 0) + as_text(recipe.name, stages, target), flush=True)
    return 0


def _prepare(arguments: argparse.Namespace) -> int:
    from ett.model.smollm2 import prepare_smollm2

    assert arguments.name == "smollm2"
    quiet_libraries()
    print(prepare_smollm2())
    return 0
