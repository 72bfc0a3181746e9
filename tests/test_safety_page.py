"""docs/safety.md names tests: each of them exists, and each rule of the design has some."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PAGE = (ROOT / "docs" / "safety.md").read_text()


def test_every_file_and_test_that_the_page_names_exists() -> None:
    named = re.findall(r"`((?:tests|raftfleet)/[\w/.]+)(?:::(\w+))?`", PAGE)
    assert len(named) > 40
    missing = []
    for path, test in named:
        file = ROOT / path
        if not file.exists() or (test and f"def {test}(" not in file.read_text()):
            missing.append(f"{path}::{test}")
    assert not missing


def test_every_rule_of_the_design_has_its_row_and_tests_of_its_own() -> None:
    design = (ROOT / "docs" / "design.md").read_text()
    rules = re.findall(r"^(\d+)\. ", design.partition("## 5. Raft rules")[2].partition("\n## 6.")[0], re.MULTILINE)
    rows = re.findall(r"^\| (\d+) \| [^*]", PAGE.partition("## Rule by rule")[2], re.MULTILINE)
    assert rows == rules == [str(number) for number in range(1, 17)]


def test_every_link_within_the_docs_leads_somewhere() -> None:
    for target in re.findall(r"\]\((?!http)([^)#]*)(?:#[^)]*)?\)", PAGE):
        assert not target or (ROOT / "docs" / target).exists(), target
    for page, anchor in re.findall(r"\]\(([\w.]*)#([\w-]+)\)", PAGE):
        text = PAGE if not page else (ROOT / "docs" / page).read_text()
        headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
        known = {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
        assert anchor in known, f"{page}#{anchor}"
