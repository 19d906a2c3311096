"""How a chat template is read: the jinja that transformers gives it, so that it means the same here."""

from __future__ import annotations

import functools
import re
import threading
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.visitor import NodeTransformer

MAX_STEPS = 100_000  # rounds of loops and calls in one rendering; a long conversation takes some thousands
MAX_LENGTH = 1 << 22  # of a text or list in it
TOO_LARGE = "it makes something that is too large"


class Refused(jinja2.TemplateError):
    """A template says of messages, by raise_exception, that it was not made for them."""


class Broken(jinja2.TemplateError):
    """A template that cannot be rendered, or never ends."""


class _Generation(Extension):
    """`{% generation %}`, which LLaVA-OneVision's own template has, marks answers for training; here it is its body."""

    tags = {"generation"}  # noqa: RUF012 - as jinja declares it

    def parse(self, parser: Parser) -> nodes.Node:
        """In a scope of its own."""
        line = next(parser.stream).lineno
        return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line)


class _Counted(NodeTransformer):
    """Lets every round of a loop, and every `~`, be a call, which the sandbox counts."""

    def visit_For(self, node: nodes.For) -> nodes.Node:
        """`_round()` first."""
        self.generic_visit(node)
        node.body.insert(0, nodes.ExprStmt(_called("_round", [])).set_lineno(node.lineno))
        return node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:
        """`_join(...)` in its place."""
        self.generic_visit(node)
        return _called("_join", node.nodes).set_lineno(node.lineno)


def _called(name: str, arguments: list[nodes.Expr]) -> nodes.Call:
    return nodes.Call(nodes.Name(name, "load"), arguments, [], None, None)


class _Bounded(ImmutableSandboxedEnvironment):
    """A sandbox, for templates come with a checkpoint, whose work has an end."""

    intercepted_binops = frozenset(("+", "*", "**", "%"))

    def __init__(self) -> None:
        super().__init__(trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols", _Generation])
        self.globals |= {"raise_exception": _raise, "_round": lambda: "", "_join": _join}
        self.filters = {name: _small(function) for name, function in self.filters.items()}
        self._done = threading.local()

    def begin(self) -> None:
        """Count anew, in this thread."""
        self._done.steps = 0

    def call(__self, __context: Any, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        """Call what a template calls."""
        __self._done.steps += 1
        if __self._done.steps > MAX_STEPS:
            raise Broken(f"it takes more than {MAX_STEPS:,} steps")
        if any(isinstance(value, int) and abs(value) > MAX_LENGTH for value in (*args, *kwargs.values())):
            raise Broken(TOO_LARGE)
        return _checked(super().call(__context, __obj, *args, **kwargs))

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        """Compute what stays small."""
        if operator == "**" and not (abs(left) < 2**32 and abs(right) < 64):
            raise Broken(TOO_LARGE)
        if operator == "%" and isinstance(left, str) and re.search(r"%[^a-zA-Z%]*(\*|\d{4})", left):
            raise Broken(TOO_LARGE)
        if operator == "*" and any(hasattr(side, "__len__") for side in (left, right)):
            many, times = (left, right) if hasattr(left, "__len__") else (right, left)
            if len(many) * times > MAX_LENGTH:
                raise Broken(TOO_LARGE)
        return _checked(super().call_binop(context, operator, left, right))


def _checked(value: Any) -> Any:
    """The value, unless it is too large to go on with."""
    if hasattr(value, "__len__") and len(value) > MAX_LENGTH:
        raise Broken(TOO_LARGE)
    return value


def _small(function: Any) -> Any:
    """A filter whose results are checked."""

    @functools.wraps(function)  # jinja's marks too
    def checked(*args: Any, **kwargs: Any) -> Any:
        if any(isinstance(value, int) and abs(value) > MAX_LENGTH for value in (*args, *kwargs.values())):
            raise Broken(TOO_LARGE)
        return _checked(function(*args, **kwargs))

    return checked


def _join(*parts: Any) -> str:
    return "".join(map(str, parts))


class ChatTemplate:
    """A chat template."""

    def __init__(self, source: str) -> None:
        """jinja2.TemplateError for what is no template."""
        self._environment = _Bounded()
        self._template = self._environment.from_string(_Counted().visit(self._environment.parse(source)))

    def render(self, turns: list[dict[str, Any]]) -> str:
        """The text that the model reads, up to where its answer begins. Refused by the template's own word, Broken for
        all else that goes wrong in it."""
        self._environment.begin()
        try:
            return self._template.render(messages=turns, add_generation_prompt=True)
        except (Refused, Broken):
            raise
        except RecursionError:
            raise Broken("it calls itself without end") from None
        except Exception as error:  # a template can raise whatever Python does: ZeroDivisionError, MemoryError, ...
            raise Broken(f"{type(error).__name__}: {' '.join(str(error).split())[:200]}") from None


def _raise(message: str) -> Any:
    raise Refused(message)
