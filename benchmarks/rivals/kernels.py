"""Where a stage's time goes: every kernel that the device ran, by kind, and the time in which it ran none.

torch's profiler records the kernels of the whole process, whoever launched them, so one yardstick serves all sides.
A stage is what a longer run has more than a shorter one: prefill is a one-token answer less vision, a step is a longer
answer less a one-token one, over its tokens.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable
from functools import partial
from typing import Any

from benchmarks.rivals.contestant import Contestant, stopwatch

STEPS = 16
KINDS = (  # the first that is found in a name; torch's, ONNX Runtime's, TensorRT's and our own
    ("matrix", r"^triton.*mm"),
    ("norm and pointwise", r"^triton"),
    ("keep", r"^(weigh|choose|exchange)"),
    ("attention", r"flash|fmha|attention|mha|attend|softmax"),
    ("matrix", r"gemm|gemv|mm$|linear|cutlass|xmma|nvjet|cublas|matmul|splitk|dot_kernel|project|gate_up"),
    (
        "copy",
        r"memcpy|memset|copy|gather|scatter|index|concat|catarray|cat$|transpose|slice|embed|widen|patches|pixels",
    ),
    (
        "norm and pointwise",
        r"norm|elementwise|pointwise|reduce|gelu|silu|rope|rotary|rotate|add|mul|cast|bias|arg|pick",
    ),
)
LISTED = 12
Counts = Counter[str]  # microseconds a kernel name


def profile(contestant: Contestant, new_tokens: int) -> dict[str, Any]:
    """Milliseconds of each stage: the wall's, the device's by kind, and the longest kernels."""
    steps = min(STEPS, new_tokens - 1)
    vision = recorded(contestant.vision)
    first, whole = (recorded(partial(contestant.answer, count)) for count in (1, 1 + steps))
    return {
        "vision": stage(*vision, 1),
        "prefill": stage(first[0] - vision[0], less(first[1], vision[1]), 1),
        "step": stage(whole[0] - first[0], less(whole[1], first[1]), steps),
    }


def recorded(work: Callable[[], object]) -> tuple[float, Counts]:
    """Seconds by the wall without the profiler, and the kernels that a second run with it launched."""
    import torch
    from torch.profiler import ProfilerActivity

    clock = stopwatch()
    work()
    seconds, on_gpu = clock(), torch.cuda.is_available()
    with torch.profiler.profile(activities=[ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU]) as found:
        work()
    kernels = Counts()
    for event in found.key_averages():
        spent = event.self_device_time_total if on_gpu else event.self_cpu_time_total
        if spent > 0:
            kernels[event.key] += spent
    return seconds, kernels


def less(more: Counts, fewer: Counts) -> Counts:
    """The difference, without what is not left."""
    return Counts({name: spent - fewer[name] for name, spent in more.items() if spent > fewer[name]})


def stage(seconds: float, kernels: Counts, times: int) -> dict[str, Any]:
    """One stage, over `times` repetitions: milliseconds."""
    kinds = Counts()
    for name, spent in kernels.items():
        kinds[kind_of(name)] += spent
    busy = sum(kernels.values())
    each = 1 / times
    return {
        "wall_ms": round(seconds * 1e3 * each, 4),
        "device_ms": round(busy / 1e3 * each, 4),
        "kinds_ms": {name: round(spent / 1e3 * each, 4) for name, spent in kinds.most_common()},
        "longest": [
            {"kernel": name[:120], "ms": round(spent / 1e3 * each, 4)} for name, spent in kernels.most_common(LISTED)
        ],
    }


def kind_of(name: str) -> str:
    """The kind of a kernel by its name."""
    found = (kind for kind, pattern in KINDS if re.search(pattern, name.lower()))
    return next(found, "other")
