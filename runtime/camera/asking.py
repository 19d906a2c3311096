"""Asking: questions and plain requests, in line for the thread that owns the model."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator

from dycoke_edge.config import Clip, Compression, Sampling
from dycoke_edge.errors import BusyError, StaleError, UsageError
from dycoke_edge.runtime.camera.answers import Answer, Window
from dycoke_edge.runtime.camera.hub import line
from dycoke_edge.runtime.camera.post import Post
from dycoke_edge.runtime.camera.turns import Question
from dycoke_edge.runtime.conversation import Asked, check_live, conversation
from dycoke_edge.runtime.pipeline import Source, VideoLLM
from dycoke_edge.runtime.reply import Piece, Reply

SAMPLING, COMPRESSION, CLIP = Sampling(), Compression(), Clip()


class Asking(ABC):
    """The half of a CameraWatcher that answers. Every method may be called from any thread."""

    _llm: VideoLLM

    @abstractmethod
    def _post(self, camera_id: str) -> Post:
        """UsageError if there is none."""

    @abstractmethod
    def _question(self, start: Callable[[], Iterator[Piece]]) -> Question:
        """Stand in line; UsageError before start, BusyError when the line is full."""

    def ask(
        self,
        camera_id: str,
        question: Asked,
        last_s: float | None = None,
        sampling: Sampling = SAMPLING,
        timeout: float | None = None,
    ) -> Answer:
        """Ask about the window of a camera, or about its `last_s` seconds. Rules and alerts are not disturbed. Of
        several messages the first shows the camera.

        UsageError for what cannot be asked; whatever else keeps it from being answered is in the answer's `status`.
        """
        try:
            pieces = self._ask(camera_id, question, last_s, sampling).pieces(timeout)
            window = self.window(camera_id)
            reply = self._llm.reply(pieces)
        except BusyError as error:
            return Answer("busy", reason=str(error))
        except StaleError as error:
            return Answer("stale", reason=str(error))
        except UsageError:
            raise
        except Exception as error:
            return Answer("failed", reason=line(error))
        return Answer("ok", reply.text, None, reply.token_ids, reply.stats, window)

    def ask_stream(
        self, camera_id: str, question: Asked, last_s: float | None = None, sampling: Sampling = SAMPLING
    ) -> Iterator[Piece]:
        """The same piece by piece. UsageError, BusyError and StaleError are raised here, at once; what fails later, by
        the iterator."""
        return self._ask(camera_id, question, last_s, sampling).pieces()

    def window(self, camera_id: str) -> Window | None:
        """When the oldest and the newest frame came that a question would be about."""
        return self._post(camera_id).lane.recent.view.window

    def generate(
        self,
        prompt: Asked,
        video: Source | None = None,
        image: Source | None = None,
        compression: Compression = COMPRESSION,
        sampling: Sampling = SAMPLING,
        clip: Clip = CLIP,
        timeout: float | None = None,
    ) -> Reply:
        """As VideoLLM.generate, in the same line as `ask`. BusyError when that is full, or after `timeout` seconds."""
        question = self._question(lambda: self._llm.stream(prompt, video, image, compression, sampling, clip))
        return self._llm.reply(question.pieces(timeout))

    def generate_stream(
        self,
        prompt: Asked,
        video: Source | None = None,
        image: Source | None = None,
        compression: Compression = COMPRESSION,
        sampling: Sampling = SAMPLING,
        clip: Clip = CLIP,
    ) -> Iterator[Piece]:
        """As VideoLLM.stream. BusyError is raised here, at once; what fails later, by the iterator."""
        return self._question(lambda: self._llm.stream(prompt, video, image, compression, sampling, clip)).pieces()

    def _ask(self, camera_id: str, question: Asked, last_s: float | None, sampling: Sampling) -> Question:
        post = self._post(camera_id)
        seconds = post.camera.window_s
        check_live(conversation(question, "the question"))
        if last_s is not None and not 0 < last_s <= seconds:
            raise UsageError(
                f"last_s={last_s:g} must be above 0 and at most {seconds:g}, the seconds that camera {camera_id} "
                f"remembers (window_s); use e.g. last_s={seconds:g}"
            )
        post.lane.check_fresh()
        return self._question(lambda: post.lane.ask(question, last_s, sampling))
