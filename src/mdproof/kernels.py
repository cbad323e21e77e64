"""What a proof says of the kernels that a block launched: one table of compiled code and devices."""

import html
from collections.abc import Mapping
from typing import Any

_COLUMNS = ("kernel", "target", "registers", "spills", "shared", "tensor_core")


def short_name(kernel: str) -> str:
    """Return `f` of "package.module:f"."""
    return kernel.rpartition(":")[2]


def tensor_instructions(row: Mapping[str, Any]) -> str:
    """Return the tensor-core instructions of a compiled kernel: "16 HGMMA", or "" for none."""
    return ", ".join(f"{count} {name}" for name, count in row["tensor_core"].items())


def without_tensor_cores(rows: list[dict[str, Any]], kernel: str) -> list[str]:
    """Return what is missing where a kernel is said to run on tensor cores, a sentence each.

    Args:
        rows: Compiled kernels, each with `target`.
        kernel: Its name.
    """
    mine = [row for row in rows if short_name(row["kernel"]) == kernel]
    if not mine:
        names = ", ".join(sorted({short_name(row["kernel"]) for row in rows})) or "no kernel"
        return [f"tensor_cores names {kernel}; the block launches {names}"]
    return [
        f"{kernel} has no tensor-core instruction on {row['target']}"
        for row in mine
        if not row["tensor_core"]
    ]


def compiled_table(record: Mapping[str, Any], words: Mapping[str, str]) -> str:
    """Return the compiled kernels of a block as a folded table, "" if there are none."""
    rows = [
        (
            short_name(kernel["kernel"]),
            way["target"],
            str(kernel["registers"]),
            f"{kernel['stack_bytes']} B",
            f"{kernel['shared_bytes']} B",
            tensor_instructions(kernel) or words["no_tensor_core"],
        )
        for way in record["verified"]
        if way["how"] == "compiled"
        for kernel in way["kernels"]
    ]
    if not rows:
        return ""
    head = "".join(f"<th>{html.escape(words[f'kernel_{name}'])}</th>" for name in _COLUMNS)
    body = "".join(
        f"<tr>{''.join(f'<td>{html.escape(cell)}</td>' for cell in row)}</tr>" for row in rows
    )
    return (
        f'<details class="mdproof-kernels" data-search-exclude><summary>{words["kernels"]}'
        f"</summary><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></details>"
    )
