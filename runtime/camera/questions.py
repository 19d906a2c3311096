"""The questions of cameras and rules are tried on the model's text when they are added, not when a window is there."""

from __future__ import annotations

from collections.abc import Callable

from dycoke_edge.config_camera import Camera, Rule
from dycoke_edge.errors import UsageError
from dycoke_edge.runtime.live_question import YES_NO

Check = Callable[[str, tuple[str, ...]], None]  # LiveQuestions.check


def check_rule(check: Check, rule: Rule) -> None:
    """UsageError that names a rule which could not be asked."""
    try:
        check(rule.prompt, YES_NO)
    except UsageError as error:
        raise UsageError(f"rule {rule.id}: {error}") from None


def check_camera(check: Check, camera: Camera) -> None:
    """The same for a camera's own prompt and its rules."""
    for rule in camera.rules:
        check_rule(check, rule)
    if camera.prompt is not None:
        try:
            check(camera.prompt, ())
        except UsageError as error:
            raise UsageError(f"camera {camera.id}: {error}") from None
