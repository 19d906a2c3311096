"""What users type, and what they get on stdout, on stderr and as an exit code."""

from __future__ import annotations

import dataclasses
import json
import os
import pty
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from dycoke_edge import __version__, cli
from dycoke_edge.cli_options import take
from dycoke_edge.config import Clip, Compression, EngineSpec, ExportSpec, Options, Sampling, flag
from tests import clips
from tests.commands import ROOT, Argument, Outcome, apart, here, python, start, wait_until

COMMANDS = ("export", "run", "inspect", "verify", "doctor", "watch", "ask", "probe", "serve", "bench")
Capture = pytest.CaptureFixture[str]


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """24 frames, 2 seconds."""
    return clips.write_clip(tmp_path_factory.mktemp("clip") / "clip.mp4", size=(96, 64))


def ask(capsys: Capture, bundle: Path, *options: Argument, tokens: int = 6) -> Outcome:
    outcome = here(capsys, "run", bundle, "--prompt", "What?", "--max-new-tokens", tokens, *options)
    assert outcome.code == 0, outcome.err
    return outcome


def stats(capsys: Capture, bundle: Path, *options: Argument, tokens: int = 6) -> dict[str, Any]:
    reply = json.loads(ask(capsys, bundle, "--json", *options, tokens=tokens).out)
    found: dict[str, Any] = reply["stats"]
    return found


# run


def test_an_answer_is_all_there_is_on_stdout(capsys: Capture, tiny_bundle: Path, clip: Path) -> None:
    plain = ask(capsys, tiny_bundle, "--video", clip, "--num-frames", 8)
    reply = json.loads(ask(capsys, tiny_bundle, "--video", clip, "--num-frames", 8, "--json").out)
    assert plain.out == reply["text"] + "\n"
    assert "what it took" in plain.err and "56 kept (43.8%)" in plain.err and "8 frames" in plain.err
    assert "6 tokens, deep layers see 16 visual rows (12.5%)" in plain.err
    assert "random weights (seed 4)" in plain.err and "\x1b" not in plain.err


def test_json_is_one_line_and_counts_are_what_arithmetic_says(capsys: Capture, tiny_bundle: Path, clip: Path) -> None:
    outcome = ask(capsys, tiny_bundle, "--video", clip, "--num-frames", 8, "--json")
    assert outcome.out.count("\n") == 1 and "what it took" not in outcome.err
    reply = json.loads(outcome.out)
    assert len(reply["token_ids"]) == 6 and reply["finish_reason"] == "length"
    found = reply["stats"]
    assert found["frames"] == 8 and found["visual_tokens_in"] == 8 * 16
    assert found["visual_tokens_kept"] == 2 * (16 + 3 * 4)  # int(0.3 * 16) = 4 of a compared frame
    assert found["mean_active_rows"] == 16  # int(56 * 0.3)
    assert found["refreshes"] >= 1 and found["new_tokens"] == 6
    assert found["compression_applied"] and found["merge_applied"] and found["keep_applied"]
    assert found["why_not"] == []
    rows = found["visual_tokens_kept"] + found["text_tokens"] + 5  # the last token is not computed on
    assert found["kv_bytes"] == rows * 3072 and found["kv_bytes_reserved"] == 8192 * 3072
    assert 0 < found["inter_token_latency_p50"] <= found["inter_token_latency_p90"] < found["time_to_first_token"] + 60


def test_without_compression(capsys: Capture, tiny_bundle: Path, clip: Path) -> None:
    found = stats(capsys, tiny_bundle, "--video", clip, "--num-frames", 8, "--no-compression")
    assert found["visual_tokens_kept"] == found["visual_tokens_in"] == found["mean_active_rows"] == 128
    assert not found["compression_applied"] and len(found["why_not"]) == 2
    assert "merge is off" in ask(capsys, tiny_bundle, "--video", clip, "--num-frames", 8, "--no-compression").err


def test_an_image_and_text_alone(capsys: Capture, tiny_bundle: Path, tmp_path: Path) -> None:
    Image.fromarray(clips.mark(9)).save(tmp_path / "a.png")
    found = stats(capsys, tiny_bundle, "--image", tmp_path / "a.png")
    assert found["frames"] == 1 and found["visual_tokens_kept"] == 16
    assert found["why_not"] == ["nothing to merge: one frame"]
    found = stats(capsys, tiny_bundle)
    assert found["frames"] == 0 and found["mean_active_rows"] == 0 and found["why_not"] == ["no video: text only"]


@pytest.mark.parametrize(
    ("options", "kept"),
    [
        (("--merge-ratio", 0.5), 2 * (16 + 3 * 8)),
        (("--merge-ratio", 0), 128),
        (("--merge-ratio", 1), 2 * 16),
        (("--mode", "official"), 3 * 16 + 5 * 4),  # frames 0, 4 and 6 whole
        (("--positions", "keep"), 56),
        (("--prune-ratio", 0), 56),
        (("--free-parked",), 56),
        (("--weigh",), 56),
        (("--refresh-threshold", 1), 56),
        (("--threads", 1, "--vision-batch", 3, "--prefill-chunk", 7, "--resident", "--kv-capacity", 128), 56),
        (("--provider", "cpu", "--mode", "paper", "--positions", "reassign"), 56),
    ],
)
def test_compression_and_engine_options(
    capsys: Capture, tiny_bundle: Path, clip: Path, options: tuple[Argument, ...], kept: int
) -> None:
    found = stats(capsys, tiny_bundle, "--video", clip, "--num-frames", 8, *options)
    assert found["visual_tokens_kept"] == kept
    assert found["keep_applied"] == (options[0] != "--prune-ratio")


@pytest.mark.parametrize(
    ("options", "frames"),
    [
        (("--num-frames", 3), 3),
        (("--num-frames", 100), 24),
        (("--fps", 4), 8),
        (("--start", 1), 12),
        (("--end", 0.5), 6),
        (("--start", 0.5, "--end", 1, "--fps", 2), 1),
    ],
)
def test_clip_options(
    capsys: Capture, tiny_bundle: Path, clip: Path, options: tuple[Argument, ...], frames: int
) -> None:
    assert stats(capsys, tiny_bundle, "--video", clip, *options)["frames"] == frames


def test_sampling_options(capsys: Capture, tiny_bundle: Path) -> None:
    def ids(*options: Argument) -> list[int]:
        found: list[int] = json.loads(ask(capsys, tiny_bundle, "--json", *options).out)["token_ids"]
        return found

    greedy, warm = ids(), ("--temperature", 5)
    assert ids(*warm, "--seed", 1) == ids(*warm, "--seed", 1) != ids(*warm, "--seed", 2)
    assert ids(*warm, "--top-p", 0) == greedy
    reply = json.loads(ask(capsys, tiny_bundle, "--json", "--stop-token-ids", greedy[2], 1).out)
    assert reply["token_ids"] == greedy[:3] and reply["finish_reason"] == "stop"


# inspect, verify, doctor, export


def test_inspect_is_arithmetic_on_files(capsys: Capture, tiny_bundle: Path) -> None:
    outcome = here(capsys, "inspect", tiny_bundle, "--json")
    assert outcome.code == 0 and outcome.err == "" and outcome.out.count("\n") == 1
    facts = json.loads(outcome.out)
    onnx = tiny_bundle / "onnx"
    on_disk = sum(p.stat().st_size for p in tiny_bundle.rglob("*") if p.is_file())
    assert facts["bytes_on_disk"] == on_disk - (tiny_bundle / "dycoke_edge.json").stat().st_size
    assert facts["kv_bytes_per_token"] == 2 * 6 * 2 * 32 * 4  # K and V, layers, KV heads, head dim, fp32
    assert facts["kv_bytes_at_capacity"] == 8192 * 3072
    graphs = {"cpu": "onnx/vision.onnx", "cuda": "onnx/vision_cuda.onnx", "tensorrt": "onnx/vision_trt.onnx"}
    assert facts["vision_graphs"] == graphs | {"kernels": "onnx/vision_weights.json"}
    assert facts["visual_tokens_in"] == 32 * 16 and facts["visual_tokens_kept"] == 8 * (16 + 3 * 4)
    assert facts["kv_rows_needed"] == 224 + 256 and facts["kv_rows_fit"] is True
    need = facts["memory_needed"]
    weights = {name: (onnx / f"{name}.onnx.data").stat().st_size for name in ("decoder_shallow", "decoder_deep")}
    assert need["decoder_weights"] == sum(weights.values())
    assert need["vision_weights"] == (onnx / "vision.onnx.data").stat().st_size
    assert need["visual_tokens"] == 512 * 128 * 4 and need["kv"] == 480 * 3072
    answering = need["decoder_weights"] + need["kv"] + need["prefill_scratch"]
    assert need["peak"] == need["process"] + need["visual_tokens"] + answering


def test_inspect_takes_settings(capsys: Capture, half_bundle: Path) -> None:
    """Any ratio: what memory it would need is worth knowing before exporting with it."""
    options = ("--merge-ratio", 0.9, "--num-frames", 4, "--kv-capacity", 100)
    facts = json.loads(here(capsys, "inspect", half_bundle, "--json", *options).out)
    assert facts["visual_tokens_kept"] == 16 + 3 * 1 and facts["merge_ratios"] == [0.5]
    assert facts["kv_rows_fit"] is False and facts["kv_bytes_at_capacity"] == 100 * 1536


def test_inspect_for_people(capsys: Capture, tiny_bundle: Path, tmp_path: Path) -> None:
    """A line a fact, whatever the path: nothing is cut off, nothing taken for markup."""
    bundle = tmp_path / "[red]:smile:" / ("long" * 30)
    bundle.parent.mkdir()
    bundle.symlink_to(tiny_bundle)
    outcome = here(capsys, "inspect", bundle)
    lines = dict(line.split(None, 1) for line in outcome.out.splitlines())
    assert lines["bundle"] == str(bundle) and lines["merge_ratios"] == "0.3 0.5 0.7 0.9"
    assert lines["kv_bytes_per_token"].startswith("3,072 (") and lines["kv_rows_needed"] == "480"
    assert outcome.err == ""


def test_verify(capsys: Capture, tiny_bundle: Path, tmp_path: Path) -> None:
    found = json.loads(here(capsys, "verify", tiny_bundle).out)
    assert found["ok"] and found["files"] == 21 and len(found["tokens"]) == 4
    bundle = tmp_path / "bundle"
    shutil.copytree(tiny_bundle, bundle)
    for name in ("onnx/decoder_deep.onnx.data", "chat_template.jinja"):
        data = bytearray((bundle / name).read_bytes())
        data[len(data) // 2] ^= 1
        (bundle / name).write_bytes(data)
        outcome = here(capsys, "verify", bundle)
        assert outcome.code == 4 and name in outcome.complaint and "export again" in outcome.complaint
        (bundle / name).write_bytes((tiny_bundle / name).read_bytes())


def test_doctor(capsys: Capture) -> None:
    facts = json.loads(here(capsys, "doctor", "--json").out)
    assert facts["can_run"] and facts["can_export"] and facts["missing"] == []
    assert "CPUExecutionProvider" in facts["onnxruntime_providers"] and facts["cpus"] >= 1
    assert facts["onnxruntime_telemetry"] == "off"
    lines = here(capsys, "doctor").out.splitlines()
    assert any(re.fullmatch(r"packages\.numpy +\d+\..*", line) for line in lines)


def test_doctor_takes_either_onnxruntime(capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    from dycoke_edge import doctor

    real = doctor._version
    monkeypatch.setattr(doctor, "_version", lambda name: None if name == "onnxruntime" else real(name))
    assert json.loads(here(capsys, "doctor", "--json").out)["can_run"]
    monkeypatch.setattr(doctor, "_onnxruntime", lambda: ([], None))
    facts = json.loads(here(capsys, "doctor", "--json").out)
    assert facts["missing"] == ["onnxruntime"] and not facts["can_run"] and not facts["can_export"]


def test_export_then_run(capsys: Capture, tiny_checkpoint: Path, tmp_path: Path) -> None:
    options = ("--dtype", "fp16", "--merge-ratio", 0.25, 1, "--split-layer", 2)
    bundle = tmp_path / "new" / "folder" / "bundle"
    outcome = here(capsys, "export", tiny_checkpoint, bundle, *options)
    assert outcome.code == 0 and json.loads(outcome.out) == {"bundle": str(bundle), "files": 18, "ok": True}
    assert re.search(r"^decoder_deep +logits +max abs \S+ +relative \S+ +argmax 100.00% +ok$", outcome.err, re.M)
    facts = json.loads(here(capsys, "inspect", bundle, "--json", "--merge-ratio", 0.25).out)
    assert (facts["dtype"], facts["split_layer"], facts["merge_ratios"]) == ("fp16", 2, [0.25, 1.0])
    assert ask(capsys, bundle, "--merge-ratio", 0.25).out
    assert sorted(path.name for path in bundle.parent.iterdir()) == ["bundle"]


# help


def test_help_is_quick() -> None:
    code = (
        "import sys\nfrom dycoke_edge.cli import main\n"
        "for argv in [['--help'], ['--version'], *([name, '--help'] for name in sys.argv[1:])]:\n"
        "    try: main(argv)\n"
        "    except SystemExit as end: assert end.code == 0\n"
        "heavy = {'torch', 'transformers', 'onnx', 'onnxruntime', 'av', 'tokenizers', 'dycoke_edge.runtime'}\n"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)\n"
    )
    outcome = python(code, *COMMANDS)
    assert outcome.code == 0 and outcome.err == ""
    assert outcome.out.count("usage: dycoke-edge") == 1 + len(COMMANDS) and f"dycoke-edge {__version__}" in outcome.out


@pytest.mark.parametrize(
    ("command", "group"),
    [("run", Compression), ("run", Sampling), ("run", Clip), ("run", EngineSpec), ("export", ExportSpec)],
)
def test_defaults_are_those_of_config(capsys: Capture, command: str, group: type[Options]) -> None:
    with pytest.raises(SystemExit):
        cli.main([command, "--help"])
    text = " ".join(capsys.readouterr().out.split("options:")[1].split())
    for field in dataclasses.fields(group):
        default = " ".join(map(str, field.default)) if isinstance(field.default, tuple) else field.default
        shown = f" (default {default})" if default is not None and default is not False else ""
        said = text.split(f"{flag(field.name)} ")[1]
        assert re.match(rf"([A-Z{{].*?)?{re.escape(field.metadata['help'] + shown)}(?! \(default)", said), field.name
    required = ["M", "B"] if command == "export" else ["B", "--prompt", "x"]
    assert take(cli.parse_args([command, *required]), group) == group()


# terminals, pipes and signals


def test_a_progress_bar_on_terminals_only(tiny_bundle: Path, clip: Path) -> None:
    arguments = ("run", tiny_bundle, "--video", clip, "--prompt", "What?", "--max-new-tokens", 4)
    ours, theirs = pty.openpty()
    process = start(*arguments, stderr=theirs)
    os.close(theirs)
    shown = b""
    while block := read(ours):
        shown += block
    out = process.communicate(timeout=60)[0]
    os.close(ours)
    assert process.returncode == 0 and b"\x1b[" in shown and b"vision" in shown and b"what it took" in shown
    assert b"\x1b[?25h" in shown  # the cursor is back
    outcome = apart(*arguments)
    assert outcome.out.encode() == out and "\x1b" not in outcome.err and "vision 2" not in outcome.err


def read(terminal: int) -> bytes:
    try:
        return os.read(terminal, 1 << 16)
    except OSError:  # Linux says that all writers have gone with EIO
        return b""


@pytest.mark.parametrize("command", [("inspect", None), ("run", None, "--prompt", "Hi"), ("run", "--help")])
def test_a_reader_that_goes_away(tiny_bundle: Path, command: tuple[str | None, ...]) -> None:
    process = start(*(part or tiny_bundle for part in command))
    assert process.stdout is not None and process.stderr is not None
    process.stdout.close()
    err = process.stderr.read().decode()
    process.stderr.close()
    assert process.wait(60) in (0, 141) and "Error" not in err and "Traceback" not in err


def test_a_full_disk_behind_stdout(tiny_bundle: Path) -> None:
    with Path("/dev/full").open("wb") as full:
        command = ["-m", "dycoke_edge", "inspect", str(tiny_bundle)]
        done = subprocess.run([sys.executable, *command], cwd=ROOT, stdout=full, stderr=subprocess.PIPE, check=False)
    assert done.returncode == 4
    assert done.stderr.decode().startswith("dycoke-edge: standard output: No space") and done.stderr.count(b"\n") == 1


@pytest.mark.usefixtures("ctrl_c")
def test_ctrl_c_while_answering(tiny_bundle: Path) -> None:
    options = ("--max-new-tokens", 30000, "--kv-capacity", 32000, "--stop-token-ids", 263)
    process = start("run", tiny_bundle, "--prompt", "Hi", *options)
    assert process.stdout is not None
    process.stdout.read(1)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert err.decode().splitlines()[-1] == "dycoke-edge: interrupted" and b"Traceback" not in err


@pytest.mark.usefixtures("ctrl_c")
@pytest.mark.parametrize(
    ("number", "code", "said"), [(signal.SIGINT, 130, "dycoke-edge: interrupted\n"), (signal.SIGTERM, 143, "")]
)
def test_an_export_that_is_stopped_leaves_nothing(
    tiny_checkpoint: Path, tmp_path: Path, number: int, code: int, said: str
) -> None:
    bundle, partial = tmp_path / "new" / "b", tmp_path / "new" / ".b.partial"
    process = start("export", tiny_checkpoint, bundle)
    wait_until(process, (partial / "tokenizer.json").exists)
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out, err.decode()) == (code, b"", said)
    assert list(tmp_path.iterdir()) == []


def test_an_export_that_is_killed_is_no_obstacle(capsys: Capture, tiny_checkpoint: Path, tmp_path: Path) -> None:
    bundle, partial = tmp_path / "b", tmp_path / ".b.partial"
    process = start("export", tiny_checkpoint, bundle)
    wait_until(process, (partial / "tokenizer.json").exists)
    process.kill()
    process.communicate(timeout=60)
    assert not bundle.exists() and partial.exists()
    (partial / "leftover").touch()
    assert here(capsys, "export", tiny_checkpoint, bundle, "--merge-ratio", 1).code == 0
    assert list(tmp_path.iterdir()) == [bundle] and not (bundle / "leftover").exists()
    assert here(capsys, "verify", bundle).code == 0


def test_what_a_library_does_of_ctrl_c_is_still_an_interruption(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def half_way() -> None:
        try:
            raise KeyboardInterrupt
        finally:
            raise AssertionError("mode stack")

    monkeypatch.setattr(cli, "examine", half_way)
    assert cli.main(["doctor"]) == 130
    assert capsys.readouterr().err == "dycoke-edge: interrupted\n"
    monkeypatch.setattr(cli, "examine", lambda: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        cli.main(["doctor"])
