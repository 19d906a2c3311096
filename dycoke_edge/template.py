"""How a chat template is read: the jinja that transformers gives it, so that it means the same here."""

from __future__ import annotations

from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment


class Refused(jinja2.TemplateError):
    """A template says of messages, by raise_exception, that it was not made for them."""


class _Generation(Extension):
    """`{% generation %}`, which LLaVA-OneVision's own template has, marks answers for training; here it is its body."""

    tags = {"generation"}  # noqa: RUF012 - as jinja declares it

    def parse(self, parser: Parser) -> nodes.Node:
        """In a scope of its own."""
        line = next(parser.stream).lineno
        return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line)


def environment() -> ImmutableSandboxedEnvironment:
    """Templates come with a checkpoint, so they run in a sandbox."""
    made = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols", _Generation]
    )
    made.globals["raise_exception"] = _raise
    return made


def _raise(message: str) -> Any:
    raise Refused(message)
