"""What users type, and what they get on stdout, on stderr and as an exit code."""

from __future__ import annotations

import dataclasses
import io
import json
import os
import pty
import re
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from dycoke_edge import Message, VideoLLM, __version__, cli, cli_chat, cli_demo
from dycoke_edge.bundle import open_bundle
from dycoke_edge.cli_options import take
from dycoke_edge.config import Clip, Compression, EngineSpec, ExportSpec, Options, Sampling, flag
from dycoke_edge.runtime import visual
from tests import clips
from tests.commands import ROOT, Argument, Outcome, apart, files, here, python, start, wait_until

COMMANDS = (
    "demo",
    "export",
    "run",
    "chat",
    "inspect",
    "verify",
    "doctor",
    "watch",
    "ask",
    "probe",
    "serve",
    "bench",
    "build",
)
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
    assert "what it took" in plain.err and "32 kept (25.0%)" in plain.err and "8 frames" in plain.err
    assert "6 tokens, deep layers see 16 visual rows (12.5%)" in plain.err
    assert "random weights (seed 4)" in plain.err and "\x1b" not in plain.err


def test_json_is_one_line_and_counts_are_what_arithmetic_says(capsys: Capture, tiny_bundle: Path, clip: Path) -> None:
    outcome = ask(capsys, tiny_bundle, "--video", clip, "--num-frames", 8, "--json")
    assert outcome.out.count("\n") == 1 and "what it took" not in outcome.err
    reply = json.loads(outcome.out)
    assert len(reply["token_ids"]) == 6 and reply["finish_reason"] == "length"
    found = reply["stats"]
    assert found["frames"] == 8 and found["visual_tokens_in"] == 8 * 16
    assert found["visual_tokens_kept"] == 8 * 4  # a quarter of every frame's
    assert found["mean_active_rows"] == 8 * 2  # half of them
    assert found["refreshes"] == 0 and found["new_tokens"] == 6
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
    assert found["why_not"][0] == "nothing to merge: one frame"
    assert found["why_not"][1].startswith("the image is one frame of 16 visual tokens, where the model's own processor")
    assert "cuts it into tiles" in ask(capsys, tiny_bundle, "--image", tmp_path / "a.png").err
    found = stats(capsys, tiny_bundle)
    assert found["frames"] == 0 and found["mean_active_rows"] == 0 and found["why_not"] == ["no video: text only"]


@pytest.mark.parametrize(
    ("options", "kept"),
    [
        (("--merge-ratio", 0.5), 2 * (16 + 3 * 8)),
        (("--merge-ratio", 0), 128),
        (("--merge-ratio", 1), 2 * 16),
        (("--mode", "official"), 3 * 16 + 5 * 4),  # frames 0, 4 and 6 whole
        (("--mode", "paper", "--weigh"), 56),
        (("--mode", "paper", "--refresh-threshold", 1), 56),
        ((), 8 * 4),  # a quarter of every frame's
        (("--budget", 0.5), 8 * 8),
        (("--budget", 1), 128),
        (("--keep", "attention", "--prune-ratio", 0.7), 8 * 4),
        (("--positions", "reassign"), 8 * 4),
        (("--prune-ratio", 0), 8 * 4),
        (("--free-parked",), 8 * 4),
        (("--threads", 1, "--vision-batch", 3, "--prefill-chunk", 7, "--resident", "--kv-capacity", 128), 8 * 4),
        (("--provider", "cpu", "--mode", "paper", "--positions", "reassign"), 56),
    ],
)
def test_compression_and_engine_options(
    capsys: Capture, tiny_bundle: Path, clip: Path, options: tuple[Argument, ...], kept: int
) -> None:
    found = stats(capsys, tiny_bundle, "--video", clip, "--num-frames", 8, *options)
    assert found["visual_tokens_kept"] == kept
    assert found["keep_applied"] == (options[:1] != ("--prune-ratio",))


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


@pytest.mark.parametrize(
    "command",
    [
        ("run", "--video", "examples/scene.mp4", "--prompt", "Is anything moving?"),
        ("run", "--json", "--prompt", "Hi"),
        ("ask", "examples/scene.mp4", "Is anything moving?"),
        ("watch", "examples/scene.mp4", "--ask", "Is anything moving?", "--window", 4, "--every", 4, "--fps", 2),
    ],
)
def test_a_model_of_one_domain_says_once_what_it_knows(
    capsys: Capture, shipped_bundle: Path, command: tuple[Argument, ...]
) -> None:
    outcome = here(capsys, command[0], shipped_bundle, *command[1:])
    assert outcome.code == 0 and outcome.err.count("this model knows drawn scenes") == 1
    assert f'Try about {shipped_bundle / "example.mp4"}: "How many objects are there?"' in outcome.err
    assert "knows" not in outcome.out and ("yes" in outcome.out or command[1] == "--json")


def test_what_a_bundle_says_to_try_is_answered(capsys: Capture, shipped_bundle: Path) -> None:
    truth = {"How many objects are there?": "two", "Is anything moving?": "yes", "Which colour is the spark?": "white"}
    knows = open_bundle(shipped_bundle).manifest.knows
    assert knows is not None and set(knows.questions) == truth.keys()
    for question, answer in truth.items():
        video = ("--video", shipped_bundle / "example.mp4")
        assert here(capsys, "run", shipped_bundle, *video, "--prompt", question).out == f"{answer}\n"


def test_an_answer_that_repeats_itself_is_stopped_and_that_is_said(capsys: Capture, shipped_bundle: Path) -> None:
    """A clip that is none of the model's scenes, and no stop token of its own: what large models do now and then."""
    strange = ("--video", "examples/clip.mp4", "--prompt", "Is anything moving?", "--stop-token-ids", 5)
    outcome = here(capsys, "run", shipped_bundle, *strange, "--json")
    reply = json.loads(outcome.out)
    assert reply["finish_reason"] == "repetition" and reply["token_ids"][-32:-16] == reply["token_ids"][-16:]
    assert "--repeat-limit 0" in outcome.err
    free = json.loads(here(capsys, "run", shipped_bundle, *strange, "--json", "--repeat-limit", 0).out)
    assert free["finish_reason"] == "length" and len(free["token_ids"]) == 128
    assert free["token_ids"][: len(reply["token_ids"])] == reply["token_ids"]


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
    assert facts["visual_tokens_in"] == 32 * 16 and facts["visual_tokens_kept"] == 32 * 4
    assert facts["kv_rows_needed"] == 128 + 256 and facts["kv_rows_fit"] is True
    need = facts["memory_needed"]
    weights = {name: (onnx / f"{name}.onnx.data").stat().st_size for name in ("decoder_shallow", "decoder_deep")}
    assert need["decoder_weights"] == sum(weights.values())
    assert need["vision_weights"] == (onnx / "vision.onnx.data").stat().st_size
    assert need["visual_tokens"] == 512 * 128 * 4 and need["kv"] == 384 * 3072
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
    assert lines["kv_bytes_per_token"].startswith("3,072 (") and lines["kv_rows_needed"] == "384"
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


# demo, chat, --quiet


def test_the_demo_answers_from_what_is_shipped(
    capsys: Capture, shipped_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cli_demo, "SHIPPED", shipped_bundle)
    outcome = here(capsys, "demo")
    assert outcome.code == 0 and outcome.out.splitlines() == [
        "How many objects are there? two",
        "Is anything moving? yes",
        "Which colour is the spark? white",
    ]
    again = shlex.split(outcome.err.splitlines()[-1].partition("dycoke-edge ")[2])
    assert here(capsys, *again).out == "two\n"


def test_a_demo_without_its_bundle_says_how_to_get_it(
    capsys: Capture, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cli_demo, "SHIPPED", tmp_path / "shipped")
    outcome = here(capsys, "demo")
    assert outcome.code == 4 and "make demo" in outcome.complaint and "export tiny BUNDLE" in outcome.complaint


def talk(capsys: Capture, monkeypatch: pytest.MonkeyPatch, bundle: Path, text: str, *options: Argument) -> Outcome:
    monkeypatch.setattr(sys, "stdin", io.StringIO(text))
    return here(capsys, "chat", bundle, *options)


def test_chat_encodes_the_clip_once_and_remembers_what_was_said(
    capsys: Capture, shipped_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoded = list[int]()
    real = visual.encode

    def encode(bundle: Any, engine: Any, frames: Any, *others: Any) -> Any:
        encoded.append(len(frames))
        return real(bundle, engine, frames, *others)

    monkeypatch.setattr(visual, "encode", encode)
    video = ("--video", "examples/scene.mp4", "--num-frames", 16)
    text = "How many objects are there?\n\n   \nWhich colour is the spark?\n/quit\nnobody hears this\n"
    outcome = talk(capsys, monkeypatch, shipped_bundle, text, *video)
    assert outcome.code == 0 and encoded == [16]
    first, second = outcome.out.splitlines()
    assert first == "two" and "192 of 784 visual tokens kept" in outcome.err and ">" not in outcome.err
    llm = VideoLLM.load(shipped_bundle)
    said = [
        Message("user", "How many objects are there?"),
        Message("assistant", "two"),
        Message("user", "Which colour is the spark?"),
    ]
    assert llm.generate(said, "examples/scene.mp4", num_frames=16).text == second


def test_chat_goes_on_after_a_question_that_cannot_be_asked(
    capsys: Capture, tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    long = "why " * 3000
    outcome = talk(capsys, monkeypatch, tiny_bundle, f"What?\n{long}\nWhat?\n", "--video", "examples/clip.mp4")
    assert outcome.code == 0 and outcome.out.count("\n") == 2
    (complaint,) = [line for line in outcome.err.splitlines() if line.startswith("dycoke-edge: ")]
    assert "tokens" in complaint


def test_chat_forgets_the_oldest_turns(capsys: Capture, tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cli_chat, "ROWS", 120)
    options = ("--video", "examples/clip.mp4", "--num-frames", 4, "--max-new-tokens", 20)
    outcome = talk(capsys, monkeypatch, tiny_bundle, "What happens here?\n" * 12, *options)
    assert outcome.code == 0 and outcome.out.count("\n") >= 12 and "dycoke-edge: " not in outcome.err


def test_chat_about_nothing(capsys: Capture, tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    outcome = talk(capsys, monkeypatch, tiny_bundle, "Hi\nHo", "--max-new-tokens", 3)
    assert outcome.code == 0 and "no --video" in outcome.err


def test_chat_prompts_where_a_person_types(tiny_bundle: Path) -> None:
    ours, theirs = pty.openpty()
    command = [sys.executable, "-m", "dycoke_edge", "chat", str(tiny_bundle), "--max-new-tokens", "3"]
    process = subprocess.Popen(command, cwd=ROOT, stdin=theirs, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    os.close(theirs)
    os.write(ours, b"Hi\n/quit\n")
    out, err = process.communicate(timeout=60)
    os.close(ours)
    assert process.returncode == 0 and err.count(b"> ") == 2 and b"> " not in out and out.count(b"\n") >= 1


@pytest.mark.parametrize("place", ["before", "after"])
def test_quiet_leaves_nothing_but_errors(capsys: Capture, tiny_bundle: Path, place: str) -> None:
    words: list[Argument] = ["run", tiny_bundle, "--prompt", "Hi", "--max-new-tokens", 2]
    words = ["--quiet", *words] if place == "before" else [*words, "--quiet"]
    outcome = here(capsys, *words)
    assert outcome.code == 0 and outcome.out and outcome.err == ""
    assert "what it took" in here(capsys, "run", tiny_bundle, "--prompt", "Hi", "--max-new-tokens", 2).err
    assert "no bundle folder" in here(capsys, "inspect", "nowhere", "--quiet").complaint


# help


def test_alone_it_prints_the_help(capsys: Capture) -> None:
    with pytest.raises(SystemExit) as end:
        cli.main([])
    printed = capsys.readouterr()
    assert end.value.code == 2 and printed.err == ""
    for name in COMMANDS:
        assert re.search(rf"^    {name} +\w", printed.out, re.M), name
    assert "A BUNDLE is a folder" in printed.out and "examples:\n  dycoke-edge demo" in printed.out


@pytest.mark.parametrize("command", COMMANDS)
def test_the_examples_of_a_command_are_command_lines(capsys: Capture, command: str) -> None:
    with pytest.raises(SystemExit):
        cli.main([command, "--help"])
    shown = capsys.readouterr().out
    examples = shown.partition("examples:\n")[2].splitlines()
    assert examples
    for line in examples:
        program, *words = shlex.split(line.partition(" <")[0], comments=True)
        assert program == "dycoke-edge" and words[0] == command
        cli.parse_args(words)
    if "BUNDLE" in shown.split("positional arguments:")[-1] and command != "export":
        assert "a folder that `dycoke-edge export MODEL_DIR BUNDLE`" in " ".join(shown.split())


def test_options_stand_in_groups(capsys: Capture) -> None:
    with pytest.raises(SystemExit):
        cli.main(["run", "--help"])
    text = capsys.readouterr().out
    parts = re.split(r"^([a-z]+):$", text, flags=re.M)
    groups = dict(zip(parts[1::2], parts[2::2], strict=True))
    for title, group in (("compression", Compression), ("sampling", Sampling), ("clip", Clip), ("engine", EngineSpec)):
        for field in dataclasses.fields(group):
            assert f"\n  {flag(field.name)}" in groups[title]
    assert "\n  --merge-ratio" not in groups["options"] and "arXiv 2411.15024" in groups["compression"]


@pytest.mark.parametrize("shell", ["bash", "zsh", "tcsh"])
def test_a_shell_completes_commands_and_options(capsys: Capture, shell: str) -> None:
    pytest.importorskip("shtab")
    with pytest.raises(SystemExit) as end:
        cli.main(["--print-completion", shell])
    printed = capsys.readouterr().out
    assert not end.value.code and all(word in printed for word in (*COMMANDS, "merge-ratio", "captured"))


def test_completion_without_shtab_says_what_to_install(capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "shtab", None)
    outcome = here(capsys, "--print-completion", "bash")
    assert outcome.code == 2 and "pip install 'dycoke-edge[completion]'" in outcome.complaint


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
        wanted = rf"([A-Z{{].*?)?{re.escape(field.metadata['help'] + shown)}(?! \(default)"
        assert any(re.match(wanted, said) for said in text.split(f"{flag(field.name)} ")[1:]), field.name
    required = ["M", "B"] if command == "export" else ["B", "--prompt", "x"]
    assert take(cli.parse_args([command, *required]), group) == group()


# terminals, pipes and signals


@pytest.mark.parametrize(
    "environment",
    [
        {"PYTHONIOENCODING": "ascii"},
        {"LC_ALL": "C"},
        {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
        {"PYTHONIOENCODING": "ascii:strict", "LC_ALL": "C"},
    ],
)
def test_an_encoding_that_lacks_letters_gets_replacements(
    tiny_bundle: Path, tmp_path: Path, environment: dict[str, str]
) -> None:
    bundle = tmp_path / "b\u00fcndel-\u52a8"
    bundle.symlink_to(tiny_bundle)
    command = [sys.executable, "-m", "dycoke_edge", "inspect"]
    for path, code in ((bundle, 0), (tmp_path / "k\u00fchn", 4)):
        done = subprocess.run(
            [*command, str(path)], cwd=ROOT, env=os.environ | environment, capture_output=True, check=False
        )
        assert done.returncode == code and b"Traceback" not in done.stderr
        assert tmp_path.name.encode() in (done.stderr if code else done.stdout)


@pytest.mark.parametrize("closed", [">&-", "2>&-", ">&- 2>&-", "<&- >&- 2>&-"])
@pytest.mark.parametrize(
    ("words", "code"), [("run {} --prompt Hi --max-new-tokens 3", 0), ("--help", 0), ("inspect nowhere", 4)]
)
def test_closed_streams_are_no_failure(tiny_bundle: Path, tmp_path: Path, closed: str, words: str, code: int) -> None:
    """What is opened later must not be taken for them either: the bundle stays as it is."""
    before = files(tiny_bundle)
    line = f"exec {shlex.quote(sys.executable)} -m dycoke_edge {words.format(shlex.quote(str(tiny_bundle)))} {closed}"
    done = subprocess.run(["sh", "-c", line], cwd=ROOT, capture_output=True, check=False)
    assert done.returncode == code and b"Traceback" not in done.stderr and files(tiny_bundle) == before
    if closed == "2>&-" and not code:
        assert done.stdout


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
    options = ("--max-new-tokens", 30000, "--kv-capacity", 32000, "--stop-token-ids", 263, "--repeat-limit", 0)
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


def test_a_checkpoint_that_says_badly_what_it_knows_is_refused(
    capsys: Capture, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    source = tmp_path / "source"
    shutil.copytree(tiny_checkpoint, source)
    config = json.loads((source / "config.json").read_text()) | {"dycoke_edge_knows": {"what": 3}}
    (source / "config.json").write_text(json.dumps(config))
    outcome = here(capsys, "export", source, tmp_path / "bundle", "--merge-ratio", 1)
    assert outcome.code == 3 and "dycoke_edge_knows must be what" in outcome.err and not (tmp_path / "bundle").exists()
