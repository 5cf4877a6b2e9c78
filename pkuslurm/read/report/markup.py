"""HTML in small pieces. Whatever comes from a model, data or a config passes through ``text`` or ``plain``."""

from __future__ import annotations

import html
from collections.abc import Iterable, Sequence

from pkuslurm.read.text import escaped, safe, unsafe

# A page of a hundred megabytes opens nowhere; the whole text is in answers.jsonl.
LONGEST = 4000


def text(value: object, longest: int = LONGEST) -> str:
    """``value`` as HTML; line ends stay, other control and direction characters are shown as what they are."""
    whole = str(value)
    cut = whole[:longest]
    parts = []
    for character in cut:
        if character in "\n\t" or not unsafe(character):
            parts.append(html.escape(character))
        else:
            parts.append(f'<span class="ctl">{html.escape(escaped(character))}</span>')
    if len(whole) > longest:
        parts.append(f'<span class="ctl">… +{len(whole) - longest}</span>')
    return "".join(parts)


def plain(value: object) -> str:
    """``value`` where no element may stand (an attribute, a title)."""
    return html.escape(safe(value), quote=True)


def both(chinese: str, english: str) -> str:
    """A label of ours: Chinese first, English beside it. HTML in, HTML out."""
    return f'{chinese} <span class="en" lang="en">{english}</span>'


def section(name: str, chinese: str, english: str, body: str) -> str:
    return f'<section id="{name}"><h2>{both(chinese, english)}</h2>\n{body}\n</section>\n'


def note(chinese: str, english: str, kind: str = "") -> str:
    """A sentence of ours. HTML in, HTML out."""
    return f'<p class="note {kind}">{chinese}<br><span class="en" lang="en">{english}</span></p>'


def missing(chinese: str, english: str) -> str:
    """What a section says in place of what is not there (yet)."""
    return note(chinese, english, "missing")


def table(header: Sequence[tuple[str, str]], rows: Iterable[Sequence[str]], style: str = "") -> str:
    """A table; ``header`` holds (Chinese, English) of our own, ``rows`` HTML. On a phone each row becomes a card.

    A row may have one cell more than the header: it stands below the others, over the whole width.
    """
    heads = "".join(f'<th scope="col">{both(chinese, english)}</th>' for chinese, english in header)
    body = []
    for row in rows:
        *row, below = row if len(row) > len(header) else [*row, ""]
        cells = "".join(
            f'<td data-l="{plain(f"{chinese} {english}".strip())}"><div>{cell}</div></td>'
            for (chinese, english), cell in zip(header, row, strict=True)
        )
        body.append(f"<tr>{cells}</tr>")
        if below:
            body.append(f'<tr class="below"><td colspan="{len(header)}"><div>{below}</div></td></tr>')
    lines = "\n".join(body)
    return f'<table class="{style}"><thead><tr>{heads}</tr></thead><tbody>\n{lines}\n</tbody></table>'
