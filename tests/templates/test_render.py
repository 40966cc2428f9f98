"""The one function that fills in templates."""

from pathlib import Path
from typing import Any

import jinja2
import jinja2.meta
import pytest

from flashtune.kernels.backends.cpp.read_bandwidth import READ_TEMPLATE
from flashtune.kernels.backends.nvidia.probe import TEMPLATE as PROBE_TEMPLATE
from flashtune.kernels.plans.candidate import PLANS
from flashtune.templates import render as module
from flashtune.templates.render import render

FOLDER = Path(module.__file__).parent


@pytest.mark.parametrize(
    "template", sorted({plan.template for plan in PLANS.values() if plan.template})
)
def test_a_missing_value_raises(template: str) -> None:
    with pytest.raises(jinja2.UndefinedError, match="is undefined"):
        render(template, {})


@pytest.mark.parametrize(
    "value", ["", "1", "a b", "a\nb", "evict_first)", "x;import os", "{{ x }}", "-1", "a.b", "é,"]
)
def test_text_that_is_no_identifier_is_rejected(value: str) -> None:
    with pytest.raises(ValueError, match="is not an identifier"):
        render("triton/_names.j2", {"evict": value})


@pytest.mark.parametrize("value", [None, [], {}, b"x", 1j, object()])
def test_a_value_of_another_type_is_rejected(value: Any) -> None:
    with pytest.raises(ValueError, match="template value evict is a"):
        render("triton/_names.j2", {"evict": value})


def test_numbers_bools_and_identifiers_are_taken() -> None:
    values = {"a": 1, "b": 0.5, "c": True, "evict": "evict_first"}
    assert render("triton/_names.j2", values).strip() == ""


def test_every_template_is_reached_from_a_plan_or_what_is_measured_of_a_device() -> None:
    def references(name: str) -> set[str]:
        parsed = jinja2.Environment().parse((FOLDER / name).read_text("utf-8"))
        return {found for found in jinja2.meta.find_referenced_templates(parsed) if found}

    waiting = {READ_TEMPLATE, PROBE_TEMPLATE}
    waiting |= {plan.template for plan in PLANS.values() if plan.template}
    reached: set[str] = set()
    while waiting:
        name = waiting.pop()
        reached.add(name)
        waiting |= references(name) - reached
    files = {path.relative_to(FOLDER).as_posix() for path in FOLDER.rglob("*.j2")}
    assert reached == files
