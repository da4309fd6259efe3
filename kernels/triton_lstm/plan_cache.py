"""Measured plans, remembered by problem, card and version of Triton."""

import dataclasses
from typing import Any, get_type_hints

import triton

from .. import remembered as findings
from .planning import Device, Family, Plan, Problem

FORMAT = 5  # raised whenever a field of Plan or of the key changes its name or meaning
KIND = "plans"


def remembered(problem: Problem, device: Device, backward: bool) -> Plan | None:
    """The plan that was fastest for this kind of problem on this card, if it was measured."""
    fields = findings.read(KIND, _key(problem, device, backward))
    if fields is None:
        return None
    try:
        return _plan(fields)
    except ValueError as error:
        findings.warn_once(f"a measured plan is ignored: {error}")
        return None


def remember(problem: Problem, device: Device, backward: bool, plan: Plan) -> None:
    """Write a measured plan."""
    value = dataclasses.asdict(plan) | {"family": plan.family.value}
    findings.write(KIND, _key(problem, device, backward), value)


def _key(problem: Problem, device: Device, backward: bool) -> findings.Key:
    return dict(
        format=FORMAT, triton=triton.__version__, card=device.name, batch=problem.batch, hidden=problem.hidden,
        projected=problem.projected, dtype=str(problem.dtype), precision=problem.precision,
        side_by_side=problem.side_by_side, regularised=problem.regularised, normalised=problem.normalised,
        backward=backward,
    )  # fmt: skip


def _plan(fields: Any) -> Plan:
    """A plan out of a file, every field checked.

    Raises:
        ValueError: a field is missing, unknown, or of another type.
    """
    types = get_type_hints(Plan)
    if not isinstance(fields, dict) or set(fields) != set(types):
        raise ValueError(f"expected the fields {sorted(types)}, got {fields!r}")
    for name, expected in types.items():
        if type(fields[name]) is not (str if expected is Family else expected):
            raise ValueError(f"expected {name} of type {expected.__name__}, got {fields[name]!r}")
    return Plan(**fields | {"family": Family(fields["family"])})
