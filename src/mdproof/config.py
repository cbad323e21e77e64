"""Read `mkdocs.yml` without a builder: the folders and the list of Markdown extensions."""

import importlib
import os
from pathlib import Path
from typing import Any

import yaml

from mdproof.errors import PageError


class _Loader(yaml.SafeLoader):
    """YAML with the tags that MkDocs and Zensical understand."""


def _python_name(loader: _Loader, suffix: str, node: yaml.Node) -> Any:
    module, _, name = suffix.rpartition(".")
    value = importlib.import_module(module)
    for part in name.split("."):
        value = getattr(value, part)
    return value


def _python_call(loader: _Loader, suffix: str, node: yaml.Node) -> Any:
    arguments = (
        loader.construct_mapping(node, deep=True) if isinstance(node, yaml.MappingNode) else {}
    )
    return _python_name(loader, suffix, node)(**arguments.get("kwds", {}))


def _env(loader: _Loader, node: yaml.Node) -> Any:
    if isinstance(node, yaml.SequenceNode):
        *names, default = [loader.construct_object(item, deep=True) for item in node.value]
        return next((os.environ[name] for name in names if name in os.environ), default)
    return os.environ.get(loader.construct_scalar(node))  # type: ignore[arg-type]


_Loader.add_multi_constructor("tag:yaml.org,2002:python/name:", _python_name)
_Loader.add_multi_constructor("tag:yaml.org,2002:python/object/apply:", _python_call)
_Loader.add_constructor("!ENV", _env)
_Loader.add_constructor("!relative", lambda loader, node: "")


def read_mkdocs(file: Path) -> dict[str, Any]:
    """Return `mkdocs.yml` as a dictionary, `INHERIT` followed.

    Raises:
        PageError: If it cannot be read, or names something that is not there.
    """
    try:
        return _read(file)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        what = getattr(error, "problem", None) or "not YAML"
        raise PageError(file.name, mark.line + 1 if mark else 1, what) from None
    except (ImportError, AttributeError, OSError) as error:
        raise PageError(file.name, 1, str(error)) from None


def parse_mkdocs(text: str) -> dict[str, Any]:
    """Return the settings in the text of a `mkdocs.yml`, `INHERIT` not followed."""
    return yaml.load(text, _Loader) or {}


def _read(file: Path) -> dict[str, Any]:
    config = parse_mkdocs(file.read_text(encoding="utf-8"))
    if not isinstance(config, dict):
        raise PageError(file.name, 1, "not a table of settings")
    parent = config.pop("INHERIT", None)
    return {**_read(file.parent / parent), **config} if parent else config


def markdown_extensions(config: dict[str, Any]) -> tuple[list[str], dict[str, dict[str, Any]]]:
    """Return the names and the options of the Markdown extensions, as MkDocs would load them."""
    names = ["toc", "tables", "fenced_code"]
    options: dict[str, dict[str, Any]] = {}
    listed = config.get("markdown_extensions") or []
    for entry in [listed] if isinstance(listed, dict) else listed:
        pairs = entry.items() if isinstance(entry, dict) else [(entry, None)]
        for name, value in pairs:
            if name not in names:
                names.append(name)
            if value:
                options[name] = value
    return names, options
