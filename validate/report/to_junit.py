"""The report as JUnit XML: one suite per section plus one for the gates, one timed test case per row."""

import re
from math import fsum
from typing import TYPE_CHECKING
from xml.etree import ElementTree

from validate.report.text import line, section_title

if TYPE_CHECKING:
    from validate.report.report import ValidationReport

NOT_IN_XML = re.compile("[^\t\n\r\u0020-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


def as_junit(report: "ValidationReport") -> bytes:
    root = ElementTree.Element("testsuites", name="wan-trt validate")
    suites: dict[str, ElementTree.Element] = {}
    for row in report.rows:
        title = section_title(row)
        suite = suites.setdefault(title, ElementTree.Element("testsuite", name=title))
        name = row.name if len(report.cases) == 1 else f"case {row.case}: {row.name}"
        shown = line(row)
        reason = row.metrics.problem or row.limit.reason
        failure = "" if row.passed else f"{shown.found}, limit {shown.limit}, {shown.margin}: {reason}"
        _test(suite, (row.component, name), failure, row.seconds)
    if report.verdicts:
        gates = suites["Gates"] = ElementTree.Element("testsuite", name="Gates")
        for verdict in report.verdicts:
            name = f"{verdict.gate.measurement}.{verdict.gate.bound}"
            _test(gates, ("gate", name), "" if verdict else str(verdict))
    root.extend(suites.values())
    for element in (root, *suites.values()):
        element.set("tests", str(len(list(element.iter("testcase")))))
        element.set("failures", str(len(list(element.iter("failure")))))
        element.set("time", _seconds(fsum(float(case.attrib["time"]) for case in element.iter("testcase"))))
    written: bytes = ElementTree.tostring(root, encoding="utf-8", xml_declaration=True)
    return written + b"\n"


def _test(suite: ElementTree.Element, names: tuple[str, str], failure: str, seconds: float = 0.0) -> None:
    attributes = {"classname": names[0], "name": _text(names[1]), "time": _seconds(seconds)}
    case = ElementTree.SubElement(suite, "testcase", attributes)
    if failure:
        ElementTree.SubElement(case, "failure", message=_text(failure))


def _seconds(seconds: float) -> str:
    return f"{seconds:.3f}"


def _text(text: str) -> str:
    """``text`` with a replacement character for every character that XML forbids."""
    return NOT_IN_XML.sub("\ufffd", text)
