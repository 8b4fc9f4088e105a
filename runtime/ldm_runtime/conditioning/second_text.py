"""Text conditioning by a second text encoder, with prompts of its own if the request gives them."""

from __future__ import annotations

from typing import Any, ClassVar

from ldm_runtime.conditioning.text import TextConditioner, for_each, texts_of
from ldm_runtime.errors import SpecError
from ldm_runtime.request import Request

__all__ = ["SecondTextConditioner"]


class SecondTextConditioner(TextConditioner):
    """A ``TextConditioner`` that encodes ``prompts_2``, or ``prompts`` if the request has no ``prompts_2``."""

    kind: ClassVar[str] = "second_text"
    fields: ClassVar[frozenset[str]] = TextConditioner.fields | {"prompts_2", "negative_prompt_2"}

    def prompts(self, request: Request) -> tuple[str, ...]:
        """See ``TextConditioner``. An empty text or list counts as not given, as in diffusers."""
        prompts = super().prompts(request)
        return (
            for_each(prompts, "prompts_2", texts_of("prompts_2", request.prompts_2)) if request.prompts_2 else prompts
        )

    def negative_prompts(self, request: Request) -> tuple[str, ...]:
        """See ``TextConditioner``. An empty text or list counts as not given, as in diffusers."""
        if not request.negative_prompt_2:
            return super().negative_prompts(request)
        if self._zeros and request.negative_prompt is None:
            raise SpecError("negative_prompt_2: got one without negative_prompt, which it depends on; give both")
        texts = texts_of("negative_prompt_2", request.negative_prompt_2)
        return for_each(self.prompts(request), "negative_prompt_2", texts)

    def example(self) -> dict[str, Any]:
        """Nothing beside the prompt of the first encoder."""
        return {}
