"""The HTTP surface, fuzzed from its own OpenAPI: whatever comes, it is answered, and never with a 500."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from dycoke_edge import VideoLLM
from dycoke_edge.config import Camera, Rule
from tests.serving import serving

YARD = Camera(
    "yard", "test://?fps=10", fps=5.0, window_s=1.0, every_s=0.5, realtime=True, prompt="What?", max_new_tokens=2
)


@pytest.mark.slow
def test_no_request_is_too_strange(tiny_bundle: Path, tmp_path: Path) -> None:
    llm = VideoLLM.load(tiny_bundle, kv_capacity=2048, prefill_chunk=64)
    limits = {"max_new_tokens": 2, "max_cameras": 4, "max_rules": 8}
    with serving(llm, [YARD], [Rule("any", "Is it?")], stream_hosts=("127.0.0.0/8",), **limits) as served:
        # /v1/events has no end, which this tool waits for; tests/test_serve_cameras.py has it.
        command = [sys.executable, "-c", "from schemathesis.cli import schemathesis; schemathesis()", "run"]
        command += [f"{served.url}/openapi.json", "--exclude-path=/v1/events", "--checks=not_a_server_error"]
        command += ["--phases=examples,coverage,fuzzing", "--mode=all", "--max-examples=12", "--seed=4"]
        command += ["--request-timeout=10", "--suppress-health-check=all", "--no-color"]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False)
        assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-1000:]
        assert "not_a_server_error" in " ".join(command) and served.http.get("/v1/health/ready").status_code == 200
        paths = served.http.get("/openapi.json").json()["paths"]
    assert f"{len(paths) - 1} selected" in done.stdout or "Tested" in done.stdout
