"""What the documents' figures are made of: tables, and the line that says where figures come from."""

from typing import Any


def told(about: dict[str, Any]) -> str:
    """One line: where, when and with what."""
    versions = ", ".join(f"{name} {v}" for name, v in about["versions"].items() if name != "flash-gsa")
    threads = f", {about['threads']} thread{'s'[: about['threads'] - 1]}" if about.get("threads") else ""
    return f"`{about['command']}` · {about['device']}{threads} · {versions} · {about['date'][:10]} · {about['commit']}"


def table(header: list[str], rows: list[list[str]]) -> str:
    """A Markdown table, the first column to the left, the others to the right."""
    rule = ["---", *["---:"] * (len(header) - 1)]
    return "\n".join("| " + " | ".join(row) + " |" for row in [header, rule, *rows])


def minutes(seconds: float) -> str:
    """ "2 min 07 s"."""
    return f"{int(seconds) // 60} min {int(seconds) % 60:02d} s"
