"""What the sides on torch share: the model in its own classes, the question's ids, frames and visual tokens."""

from __future__ import annotations

from inspect import signature
from typing import Any

import torch
from torch import Tensor

from benchmarks.rivals.contestant import PROMPT, Job, Side
from dycoke_edge.runtime.synthetic import moving_patch


class TorchSide:
    """LLaVA-OneVision in transformers, SDPA. The frames are uploaded as bytes and normalised on the device."""

    def __init__(self, job: Job, side: Side) -> None:
        from transformers import LlavaOnevisionForConditionalGeneration

        if job.device == "cpu":
            torch.set_num_threads(1)
        self.job, self.side, self.device = job, side, torch.device(job.device)
        load: Any = LlavaOnevisionForConditionalGeneration.from_pretrained
        dtype = torch.float16 if job.half else torch.float32
        self.model = load(job.checkpoint, dtype=dtype, attn_implementation="sdpa").to(self.device).eval()
        self.model.generation_config.eos_token_id = None  # no side stops
        config = self.model.config
        self.language, self.text = self.model.model.language_model, config.text_config
        names = signature(type(self.language).forward).parameters
        self._cached = "cache" if "cache" in names else "past_key_values"  # transformers 5.24 has a new name for it
        size = config.vision_config.image_size
        side_tokens = -(-(size // config.vision_config.patch_size) // 2)
        self.per_frame = side_tokens * side_tokens
        self.visual = job.frames * self.per_frame
        self.frames = torch.from_numpy(moving_patch(job.frames, size))
        self.prefix, self.suffix = (part.to(self.device) for part in self._ids())

    def _ids(self) -> tuple[Tensor, Tensor]:
        """Ids before and after the place of the video, [P] and [Q]."""
        from transformers import AutoTokenizer

        tokenizer: Any = AutoTokenizer.from_pretrained(self.job.checkpoint)
        content = [{"type": "video"}, {"type": "text", "text": PROMPT}]
        turn = [{"role": "user", "content": content}]
        chat = tokenizer.apply_chat_template(turn, add_generation_prompt=True, tokenize=False)
        before, after = (tokenizer(part, return_tensors="pt").input_ids[0] for part in chat.split("<video>"))
        return before, after

    def hidden(self, cache: Any, **inputs: Tensor) -> Tensor:
        """The language model's last hidden states [1, T, E]; keys and values are added to `cache`."""
        given: Any = self.language(**inputs, **{self._cached: cache}, use_cache=True)
        hidden: Tensor = given.last_hidden_state
        return hidden

    def ids(self) -> Tensor:
        """The whole prompt as `generate` takes it: [1, P + M + 1 + Q], the newline's place included."""
        place = self.prefix.new_full((self.visual + 1,), self.model.config.video_token_id)
        return torch.cat((self.prefix, place, self.suffix))[None]

    def pixels(self) -> Tensor:
        """[1, F, 3, R, R], normalised."""
        pixels = self.frames.to(self.device).permute(0, 3, 1, 2).to(self.model.dtype)
        normalised: Tensor = (pixels / 255 - 0.5) / 0.5
        return normalised[None]

    def tokens(self) -> Tensor:
        """Visual tokens [F, N, E]."""
        features = self.model.model.get_video_features(self.pixels()).pooler_output
        # transformers 5.23 puts the newline behind the features, 5.17 did not
        tokens: Tensor = features.reshape(-1, features.shape[-1])[: self.visual]
        return tokens.view(self.job.frames, self.per_frame, -1)

    def embeds(self, visual: Tensor) -> Tensor:
        """The prompt's embeddings [1, P + M + 1 + Q, E] around visual tokens [M, E]."""
        embed = self.language.embed_tokens
        parts = embed(self.prefix), visual, self.model.model.image_newline[None], embed(self.suffix)
        return torch.cat(parts)[None]

    @torch.no_grad()
    def vision(self) -> None:
        """Encode the frames."""
        self.tokens()
        self.wait()

    def wait(self) -> None:
        """Until the device has done what it was given."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()
