"""Text of others in Markdown: names, values and reasons are shown as they are, and structure nothing."""

import re

# What can begin or end emphasis, code, a link, HTML, a formula or a cell. An underscore within a word and a sign of
# comparison with space around it are read as such anyway, and `&` only begins an entity.
SPECIAL = re.compile(
    r"([\\`*\[\]|~$])|(?<![^\W_])(_)|(_)(?![^\W_])|(<)(?=[A-Za-z/!?])|(&)(?=#?\w+;)|(:)(?=[\w+-]+:)|(@)(?=\w)"
)


def escape(value: object) -> str:
    """The value in one line, to be put into a line or a table's cell."""
    return SPECIAL.sub(lambda found: f"\\{found[0]}", " ".join(str(value).split()))


def row(*cells: object) -> str:
    """A row of a table."""
    return "| " + " | ".join(map(escape, cells)) + " |"


def table(*names: str) -> tuple[str, str]:
    """The head of a table with these columns."""
    return row(*names), "|" + "---|" * len(names)


def span(value: str) -> str:
    """The value as code."""
    return "`" + " ".join(value.split()).replace("`", "'") + "`"
