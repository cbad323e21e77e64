"""What a proof says of the kernels that a block launched: a table of their compiled code."""

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


def benchmark_tables(
    record: Mapping[str, Any], words: Mapping[str, str], old: Mapping[str, str]
) -> str:
    """Return a folded table for each benchmark that was recorded on a device.

    Args:
        record: The block's record.
        words: The words of the page's language.
        old: By device, why what was measured there no longer holds.
    """
    parts = []
    for way in record["verified"]:
        rows = way.get("benchmark", {}).get("rows") or []
        if way["how"] != "device" or not rows:
            continue
        names = list(dict.fromkeys(n for row in rows for n in row if _time(row[n])))
        head = "".join(f"<th>{html.escape(n)}</th>" for n in (words["benchmark_case"], *names))
        body = "".join(
            f"<tr><td>{html.escape(_case(row))}</td>"
            + "".join(f"<td>{html.escape(_time(row.get(n)))}</td>" for n in names)
            + "</tr>"
            for row in rows
        )
        title = words["benchmark_old" if old.get(way["device"]) else "benchmark"]
        summary = html.escape(title.format(way["device"], way["benchmark"]["date"]))
        state = ' data-mdproof-state="stale"' if old.get(way["device"]) else ""
        parts.append(
            f'<details class="mdproof-kernels" data-search-exclude{state}><summary>{summary}'
            f"</summary><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></details>"
        )
    return "".join(parts)


def _case(row: Mapping[str, Any]) -> str:
    case = row.get("case", {})
    shown = [f"{name}={value}" for name, value in case.items()] if isinstance(case, Mapping) else []
    return " ".join([*shown, *([str(row["pass"])] if "pass" in row else [])])


def _time(value: Any) -> str:
    """Return a measured candidate's time, and its rate if it has one; "" if it is none."""
    if not isinstance(value, Mapping) or not isinstance(value.get("ms"), int | float):
        return ""
    rate = value.get("tflops")
    shown = f" · {rate:.0f} TFLOP/s" if isinstance(rate, int | float) else ""
    return f"{value['ms']:.3f} ms{shown}"
