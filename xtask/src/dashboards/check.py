"""Reads dashboards with Grafana's published model of them: every key must be known, every value be of its type.

Argument: the folder of the dashboards. Prints what is wrong, with its place, and exits with 1.
"""

import dataclasses
import enum
import json
import pathlib
import sys
import types
import typing

from grafana_foundation_sdk.cog import encoder, plugins, runtime
from grafana_foundation_sdk.models import dashboard

faults = []


def compare(place, ours, theirs):
    """Whatever we wrote must have been understood, and so be written again."""
    if isinstance(ours, dict) and isinstance(theirs, dict):
        for key, value in ours.items():
            if key not in theirs:
                if value is not None:
                    faults.append(f"{place}.{key}: unknown")
            else:
                compare(f"{place}.{key}", value, theirs[key])
    elif isinstance(ours, list) and isinstance(theirs, list) and len(ours) == len(theirs):
        for number, (our, their) in enumerate(zip(ours, theirs)):
            compare(f"{place}[{number}]", our, their)
    elif ours != theirs:
        faults.append(f"{place}: {ours!r} is understood as {theirs!r}")


def fits(value, hint, names):
    """Whether a value is of the type that the model states."""
    if isinstance(hint, str):
        hint = eval(hint, names)
    if isinstance(hint, typing.ForwardRef):
        hint = eval(hint.__forward_arg__, names)
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if hint in (typing.Any, object):
        return True
    if origin in (typing.Union, types.UnionType):
        return any(fits(value, one, names) for one in inner)
    if origin is typing.Literal:
        return value in inner
    if origin is list:
        return isinstance(value, list) and all(fits(one, inner[0], names) for one in value)
    if origin is dict:
        return isinstance(value, dict)
    if hint is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    if isinstance(hint, type) and issubclass(hint, enum.Enum):
        return value in [one.value for one in hint]
    if isinstance(hint, type) and hint in (str, bool, type(None)):
        return isinstance(value, hint)
    # A class of the model: looked at by itself, or left as JSON by the model.
    return isinstance(value, (hint, dict)) if isinstance(hint, type) else True


def look(place, value):
    """Checks the types of everything that the model made."""
    if isinstance(value, list):
        for number, one in enumerate(value):
            look(f"{place}[{number}]", one)
    elif hasattr(value, "to_json") and not isinstance(value, enum.Enum):
        names = vars(sys.modules[type(value).__module__])
        for name, hint in type(value).__annotations__.items():
            one = getattr(value, name)
            if not fits(one, hint, names):
                faults.append(f"{place}.{name}: {one!r} is no {hint}")
            look(f"{place}.{name}", one)


plugins.register_default_plugins()
files = sorted(pathlib.Path(sys.argv[1]).glob("*.json"))
for file in files:
    ours = json.loads(file.read_text())
    model = dashboard.Dashboard.from_json(ours)
    theirs = json.loads(json.dumps(model, cls=encoder.JSONEncoder))
    compare(file.name, ours, theirs)
    look(file.name, model)
print(*faults, sep="\n")
sys.exit(1 if faults or not files else 0)
