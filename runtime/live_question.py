"""What can be asked about a live video: known without one, so that a question is refused when it is written down."""

from __future__ import annotations

import numpy as np

from dycoke_edge.bundle import Bundle
from dycoke_edge.config import LiveSpec
from dycoke_edge.errors import UsageError
from dycoke_edge.runtime.conversation import Asked, called, check_live, conversation
from dycoke_edge.runtime.loop import Ids
from dycoke_edge.runtime.text import Text

YES_NO = ("yes", "no")


class LiveQuestions:
    """The token ids of questions about videos that were seen before. `prefix` [P] are those before the video."""

    def __init__(self, bundle: Bundle, text: Text, spec: LiveSpec) -> None:
        self._newline, self._text, self._most = bundle.manifest.newline_id, text, spec.max_question_tokens
        self.prefix = text.encode("?", "video")[0]

    def ids(self, prompt: Asked) -> Ids:
        """The ids after the video: the newline that the model puts there, the question, the template's end. UsageError
        for what cannot be asked."""
        check_live(conversation(prompt))
        prefix, suffix = self._text.encode(prompt, "video")
        if not np.array_equal(prefix, self.prefix):
            raise UsageError(
                f"{called(prompt)}: text before the live video, which was seen already; leave <video> or <image> out"
            )
        if len(suffix) + 1 > self._most:
            raise UsageError(
                f"{called(prompt)}: {len(suffix) + 1} tokens with the chat template, a live video keeps "
                f"{self._most} rows for it; use --max-question-tokens {len(suffix) + 1}"
            )
        return np.concatenate([[self._newline], suffix]).astype(np.int64)

    def check(self, prompt: Asked, answers: tuple[str, ...] = ()) -> None:
        """UsageError for a prompt that could not be asked, or not be scored by these answers."""
        self.ids(prompt)
        if answers:
            self._text.first_tokens(answers)
