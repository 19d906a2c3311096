"""The HTTP surface, fuzzed from its own OpenAPI: whatever comes, it is answered, and never with a 500."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from dycoke_edge import VideoLLM
from dycoke_edge.config_camera import Camera, Rule
from tests.serving import Served, serving

PACE: dict[str, Any] = {"fps": 5.0, "window_s": 1.0, "every_s": 0.5, "realtime": True}
YARD = Camera("yard", "test://?fps=10", prompt="What?", max_new_tokens=2, **PACE)
NAMES = ["yard", "any", "none"]


def described(served: Served) -> dict[str, Any]:
    """The OpenAPI, with names that exist where a random one would only be not found."""
    api: dict[str, Any] = served.http.get("/openapi.json").json()
    parts = api["components"]["schemas"]
    parts["ChatRequest"]["properties"]["model"]["enum"] = [served.model]
    parts["StreamRef"]["properties"]["stream_id"]["enum"] = NAMES
    parts["NewStream"]["properties"]["liveStreamUrl"]["enum"] = [
        "rtsp://127.0.0.1:9/a",
        "rtsp://127.0.0.1:9/b",
        "gst://x",
    ]
    for path in api["paths"].values():
        for operation in path.values():
            for parameter in operation.get("parameters", []):
                if parameter["in"] == "path":
                    parameter["schema"]["enum"] = [served.model] if parameter["name"] == "model_id" else NAMES
    del api["paths"]["/v1/events"]  # it has no end, which the tool waits for; tests/test_serve_cameras.py has it
    return api


@pytest.mark.slow
def test_no_request_is_too_strange(tiny_bundle: Path, tmp_path: Path) -> None:
    llm = VideoLLM.load(tiny_bundle, kv_capacity=2048, prefill_chunk=64)
    limits: dict[str, Any] = {"max_new_tokens": 2, "max_cameras": 4, "max_rules": 8}
    with serving(llm, [YARD], [Rule("any", "Is it?")], stream_hosts=("127.0.0.0/8",), **limits) as served:
        api = described(served)
        (tmp_path / "api.json").write_text(json.dumps(api))
        command = [sys.executable, "-c", "from schemathesis.cli import schemathesis; schemathesis()", "run"]
        command += ["api.json", f"--url={served.url}", "--checks=not_a_server_error", "--mode=all", "--seed=4"]
        command += ["--phases=coverage,fuzzing", "--max-examples=12", "--request-timeout=10", "--no-color"]
        command += ["--suppress-health-check=all"]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False)
        print(done.stdout)  # which case failed, with the request that repeats it
        assert served.http.get("/v1/health/ready").status_code == 200
        answered = served.watcher.status()["questions"]["answered"]
    assert done.returncode == 0, done.stderr
    cases = re.search(r"(\d+) generated, (\d+) passed", done.stdout)
    assert cases is not None and int(cases[1]) == int(cases[2]) > 20 * len(api["paths"])
    assert answered > 0  # some of them were real questions
