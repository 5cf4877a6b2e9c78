"""The page, put together."""

from __future__ import annotations

from importlib.resources import files

from pkuslurm import __version__
from pkuslurm.read.report import dataset, details, results
from pkuslurm.read.report.facts import Facts
from pkuslurm.read.report.headline import headline
from pkuslurm.read.report.markup import both, plain

# nothing is loaded and nothing runs, whatever a model's answer may contain
POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"

SECTIONS = (
    results.answers,
    results.loss,
    results.checks,
    dataset.data,
    details.timings,
    details.jobs,
    details.settings,
    details.versions,
    results.disk,
)


def page(facts: Facts) -> str:
    """The whole page; every section says itself what it lacks."""
    body = "".join(section(facts) for section in SECTIONS)
    return framed(f"{facts.now.run_id} · {facts.state}", headline(facts) + body)


def framed(title: str, body: str) -> str:
    """``body``, which is HTML, as a page of ours."""
    style = files(__package__).joinpath("report.css").read_text(encoding="utf-8")
    foot = both("由 pkuslurm 写出，不含脚本，不访问网络", "written by pkuslurm; no script, no network")
    return (
        '<!doctype html>\n<html lang="zh-CN">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n<meta name="referrer" content="no-referrer">\n'
        f"<title>{plain(title)} · pkuslurm</title>\n<style>\n{style}</style>\n"
        f"</head>\n<body>\n<main>\n{body}"
        f'<footer><p>{foot} <span class="muted">{plain(__version__)}</span></p></footer>\n</main>\n</body>\n</html>\n'
    )
