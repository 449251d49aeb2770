"""Any image-text-to-text model in the transformers layout that a path names: Mllama, Qwen-VL, Gemma 3, SmolVLM, ...

Decoding is greedy, so an answer is a function of weights, prompt, image and the images that it was batched with.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from factory.models.captioners.protocol import Answer, Request
from factory.models.device_errors import is_out_of_memory
from factory.models.weights import tree_digest
from factory.progress import Stopped


class TransformersCaptioner:
    """`TransformersCaptioner(directory).ask(requests)`: answers of a local model, batched by length.

    Only safetensors are read, nothing is fetched, no code of the directory is run. float32 on a CPU, bfloat16 on a
    GPU. A batch that runs out of memory is halved and tried again; a request that fails alone is a named problem.
    """

    name = "transformers"

    def __init__(
        self, directory: str | Path, max_new_tokens: int = 256, batch_size: int = 8, device: str = "cpu"
    ) -> None:
        from transformers import AutoModelForImageTextToText, AutoProcessor
        from transformers.utils.logging import disable_progress_bar

        disable_progress_bar()
        self.directory, self.device = Path(directory), device
        self.max_new_tokens, self.batch_size = max_new_tokens, batch_size
        self._last_error = self._stopped = ""
        self.digest = tree_digest(directory, "caption.model")
        try:
            self.processor = AutoProcessor.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
            model = AutoModelForImageTextToText.from_pretrained(
                directory,
                local_files_only=True,
                use_safetensors=True,
                trust_remote_code=False,
                dtype=torch.float32 if device == "cpu" else torch.bfloat16,
            )
        except (OSError, ValueError, KeyError) as error:
            raise ValueError(
                f"caption.model must be an image-text-to-text model with its processor, got {directory} "
                f"({str(error).splitlines()[0]}); save both with `save_pretrained` or name another."
            ) from error
        self.model = model.eval().to(device)
        self.tokenizer = self.processor.tokenizer
        self.tokenizer.padding_side = "left"  # what is generated follows what was asked
        if self.tokenizer.pad_token_id is None:
            self.tokenizer.pad_token = self.tokenizer.eos_token

    def ask(self, requests: Sequence[Request]) -> list[Answer]:
        """One answer per request, in order. Raises Stopped where not one of several requests can be run."""
        if self._stopped:
            raise Stopped(self._stopped)
        answers: list[Answer | None] = [None] * len(requests)
        order = sorted(range(len(requests)), key=lambda k: _length(requests[k]), reverse=True)
        for start in range(0, len(order), self.batch_size):
            places = order[start : start + self.batch_size]
            for place, answer in zip(places, self._halving([requests[k] for k in places]), strict=True):
                answers[place] = answer
        found = [answer for answer in answers if answer is not None]
        if len(found) > 1 and all(answer.problem == "generation_failed" for answer in found):
            self._stopped = (
                f"the model in {self.directory} failed on all of {len(found)} images ({self._last_error}); "
                "try it by itself, or name another caption.model, and run the same command."
            )
            raise Stopped(self._stopped)
        return found

    def _halving(self, requests: Sequence[Request]) -> list[Answer]:
        """The batch as one; where that fails its halves, down to single requests that fail for themselves."""
        try:
            return self._generated(requests)
        except Exception as error:  # whatever a model's own code raises
            self._last_error = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:200]}"
            problem = "out_of_memory" if is_out_of_memory(error) else "generation_failed"
        if problem == "out_of_memory" and torch.cuda.is_available():
            torch.cuda.empty_cache()
        if len(requests) == 1:
            return [Answer(None, problem)]
        middle = (len(requests) + 1) // 2
        return self._halving(requests[:middle]) + self._halving(requests[middle:])

    @torch.inference_mode()
    def _generated(self, requests: Sequence[Request]) -> list[Answer]:
        inputs = self.inputs(requests)
        made = self.model.generate(**inputs, **self.generation())
        asked = inputs["attention_mask"].sum(dim=1).tolist()
        new = made[:, inputs["input_ids"].shape[1] :].cpu()
        texts = self.tokenizer.batch_decode(new, skip_special_tokens=True)
        return [
            Answer(text, tokens_in=int(count), tokens_out=self._num_tokens(row))
            for text, count, row in zip(texts, asked, new, strict=True)
        ]

    def generation(self) -> dict[str, Any]:
        """What `generate` is called with beside the inputs."""
        return {
            "max_new_tokens": self.max_new_tokens,
            "do_sample": False,
            "num_beams": 1,
            "pad_token_id": self.tokenizer.pad_token_id,
        }

    def inputs(self, requests: Sequence[Request]) -> Any:
        """The model's inputs for one batch, on its device, padded on the left."""
        chat = bool(getattr(self.processor, "chat_template", None))
        inputs = self.processor(
            images=[[Image.fromarray(request.image)] for request in requests],
            text=[self._worded(request.prompt, chat) for request in requests],
            padding=True,
            add_special_tokens=not chat,  # a chat template has written them already
            return_tensors="pt",
        )
        return inputs.to(self.device, dtype=self.model.dtype)  # only what is floating changes its type

    def _worded(self, prompt: str, chat: bool) -> str:
        if not chat:
            return f"{getattr(self.processor, 'image_token', '<image>')}{prompt}"
        content = [{"type": "image"}, {"type": "text", "text": prompt}]
        messages = [{"role": "user", "content": content}]
        return str(self.processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False))

    def _num_tokens(self, row: torch.Tensor) -> int:
        """Tokens up to and with the first that ends a text."""
        ends = self.model.generation_config.eos_token_id
        known = [] if ends is None else [ends] if isinstance(ends, int) else list(ends)
        at = [k for k, token in enumerate(row.tolist()) if token in known]
        return at[0] + 1 if at else len(row)


def _length(request: Request) -> tuple[int, int]:
    """What a request's tokens grow with: the image's pixels, then the prompt's letters."""
    height, width = request.image.shape[:2]
    return height * width, len(request.prompt)
